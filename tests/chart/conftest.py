"""The chart, rendered by a real Helm (v4, as a library)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..conftest import ROOT

CHART = ROOT / "charts" / "gemma-serve"
PRESETS = sorted(CHART.glob("values-*.yaml"))
RELEASE, NAMESPACE = "demo", "prod"

Manifest = dict[str, Any]
Render = Callable[..., list[Manifest]]

EVERYTHING: dict[str, Any] = {
    "apiKeys": {"file": "keys: []\n"},
    "huggingFace": {"token": "hf_x"},
    "redis": {"deploy": True},
    "weights": {"download": "job", "persistentVolumeClaim": {"accessMode": "ReadWriteMany"}},
    "ingress": {"enabled": True, "hosts": ["gemma.example.com"], "tlsSecret": "tls"},
    "config": {"security": {"trusted_proxies": ["10.0.0.0/8"]}},
    "gateway": {
        "enabled": True,
        "parentRefs": [{"name": "public"}],
        "hostnames": ["gemma.example.com"],
        "sessionPersistence": True,
    },
    "autoscaling": {"kind": "hpa"},
    "monitoring": {"kind": "PodMonitor", "keySecret": "scraper", "alerts": True, "dashboard": True},
    "test": {"keySecret": "tester"},
    "preStopSeconds": 5,
    "image": {"pullSecrets": ["registry"]},
    "networkPolicy": {"from": [{"podSelector": {}}], "egress": [{"ports": [{"port": 4317}]}]},
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
    "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
    "podLabels": {"team": "a"},
    "podAnnotations": {"note": "b"},
    "serviceAccount": {"annotations": {"c": "d"}},
}
"""Whatever the chart can make, but for what excludes each other."""


class Refused(Exception):
    """Helm did not render; the message is what its user reads."""


def merged(*parts: Manifest) -> Manifest:
    result: Manifest = {}
    for part in parts:
        for name, value in part.items():
            known = result.get(name)
            both = isinstance(known, dict) and isinstance(value, dict)
            result[name] = merged(known, value) if both else value  # type: ignore[arg-type]
    return result


def read(path: Path) -> Manifest:
    content: Manifest = yaml.safe_load(path.read_text(encoding="utf8"))
    return content


@pytest.fixture(scope="session")
def render() -> Iterator[Render]:
    """`render(values, …)`: the manifests of the chart with these values, later ones over earlier ones."""
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk has no wheel for this machine")
    with helm.Chart.load(CHART) as chart:

        def render(*values: Manifest) -> list[Manifest]:
            try:
                files = chart.render(merged(*values), name=RELEASE, namespace=NAMESPACE)
            except helm.HelmError as error:
                raise Refused(str(error)) from None
            texts = [text for name, text in files.items() if not name.endswith(".txt")]
            return [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]

        yield render


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def pods(manifests: list[Manifest]) -> list[Manifest]:
    """The pods that these objects make, each as a Pod of its own."""
    found = []
    for manifest in manifests:
        spec = manifest.get("spec", {})
        group = spec.get("leaderWorkerTemplate", {})
        for template in (spec.get("template"), group.get("leaderTemplate"), group.get("workerTemplate")):
            if template and "spec" in template:
                found.append({"apiVersion": "v1", "kind": "Pod", **template})
        if manifest["kind"] == "Pod":
            found.append(manifest)
    return found


def servers(manifests: list[Manifest]) -> list[Manifest]:
    return [pod for pod in pods(manifests) if component(pod) == "server"]


def component(pod: Manifest) -> str:
    return str(pod["metadata"]["labels"]["app.kubernetes.io/component"])


def container(pod: Manifest, name: str = "server") -> Manifest:
    (found,) = [each for each in pod["spec"]["containers"] if each["name"] == name]
    return dict(found)


def settings_file(manifests: list[Manifest]) -> Manifest:
    (config,) = [each["data"] for each in of_kind(manifests, "ConfigMap") if "config.yaml" in each["data"]]
    content: Manifest = yaml.safe_load(config["config.yaml"])
    return content


def seconds(text: str) -> float:
    """`30m` of Go or Kubernetes."""
    found = re.fullmatch(r"([\d.]+)(ms|s|m|h)", text)
    assert found, text
    return float(found[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[found[2]]
