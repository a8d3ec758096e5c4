"""Wrong values are refused with a sentence that says what would be right."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import CHART, Refused, Render, merged, read

TP = {"preset": "gemma-3-27b-tp2"}
RWX = {"weights": {"persistentVolumeClaim": {"accessMode": "ReadWriteMany"}}}

KEYS = f"""\
keys:
- {{name: ci, sha256: {"0" * 64}, limits: {{in_flight: 0}}}}
- {{name: alice, sha256: {"1" * 64}, limits: {{tokens_per_day: 9}}}}
"""

WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"config": {"engine": {"tensor_parallel_size": 4}}, "gpu": {"count": 2}},
        "gpu.count: is 2, but the engine needs 4 GPUs in each pod (tensor_parallel_size 4",
    ),
    ({"weights": {"from": "hostPath"}}, "weights.hostPath: no storage for the weights"),
    ({"weights": {"from": "image"}}, "weights.image.reference: no storage for the weights"),
    ({"weights": {"from": "none"}}, "weights"),
    (
        merged(RWX, {"replicas": 2, "config": {"security": {"rate_limit_per_minute": 60}}}),
        "config.security.rate_limit_per_minute: each of several servers would count for itself",
    ),
    (
        merged(RWX, {"autoscaling": {"kind": "keda"}, "config": {"security": {"tokens_per_day": 9}}}),
        "config.security.tokens_per_day",
    ),
    (
        merged(RWX, {"replicas": 2, "apiKeys": {"file": KEYS}}),
        "apiKeys.file: tokens_per_day of alice: each of several servers would count for itself",
    ),
    ({"config": {"models": {"other": {"name": "google/gemma-3-1b-it"}}}}, "config.models: use a release for"),
    (
        {"env": [{"name": "GEMMA_SECURITY_RATE_LIMIT_PER_MINUTE", "value": "5"}]},
        "env: GEMMA_SECURITY_RATE_LIMIT_PER_MINUTE would go past the checks of this chart; settings go below",
    ),
    ({"replicas": 2}, "several pods on different nodes cannot share a ReadWriteOnce volume"),
    ({"image": {"tag": "latest"}}, "`latest` is another server tomorrow"),
    ({"preset": "gemma-5"}, 'there is no "gemma-5"; the presets are demo, functiongemma, gemma-2b-it'),
    ({"device": "cpu"}, "device: is cpu, but the preset or config.performance.device says cuda"),
    ({"device": "cpu", "preset": "demo", "gpu": {"count": 1}}, "gpu.count: is 1, but device is cpu"),
    ({"config": {"engine": {"nnodes": 2}}}, "set multiNode.enabled"),
    (merged(TP, RWX, {"multiNode": {"enabled": True, "nodes": 3}}), "2 GPUs (tensor_parallel_size 2"),
    (
        merged(TP, RWX, {"multiNode": {"enabled": True}, "config": {"engine": {"data_parallel_size": 2}}}),
        "config.engine.data_parallel_size: not with multiNode",
    ),
    (merged(TP, {"multiNode": {"enabled": True}}), "cannot share a ReadWriteOnce volume"),
    ({"config": {"model": {"name": "/data/gemma"}}}, "/data/gemma is not in weights.mountPath"),
    ({"config": {"model": {"name": "/models-2/gemma"}}}, "/models-2/gemma is not in weights.mountPath"),
    (
        {"config": {"server": {"tls_certificate": "/tls/tls.crt", "tls_private_key": "/tls/tls.key"}}},
        "config.server.tls_certificate: no volume of the pod holds /tls/tls.crt; name a Secret",
    ),
    (
        {"config": {"server": {"tls_certificate": "/etc/gemma-serve-tls/tls.crt"}}},
        "tls_certificate: no volume of the pod holds /etc/gemma-serve-tls/tls.crt",
    ),
    ({"tls": {"existingSecret": "a"}, "config": {"server": {"tls_private_key": "/k"}}}, "holds /k; name"),
    (
        {"weights": {"persistentVolumeClaim": {"accessMode": "ReadOnlyMany"}, "download": "none"}},
        "weights.persistentVolumeClaim.existing: nothing could fill a ReadOnlyMany claim",
    ),
    (
        {"weights": {"persistentVolumeClaim": {"accessMode": "ReadOnlyMany", "existing": "gemmas"}}},
        "weights.download: init cannot write into a ReadOnlyMany volume",
    ),
    ({"weights": {"download": "job"}}, "weights.download: a job on another node than the servers"),
    ({"weights": {"from": "emptyDir", "download": "job"}}, "a job cannot fill a volume of the kind emptyDir"),
    (
        {"monitoring": {"kind": "ServiceMonitor"}, "apiKeys": {"existingSecret": "keys"}},
        "monitoring.keySecret: /metrics needs a key of scope `metrics`",
    ),
    ({"redis": {"deploy": True, "url": "redis://x"}}, "redis: give one of"),
    ({"apiKeys": {"file": "keys: []", "existingSecret": "keys"}}, "apiKeys: give one of"),
    ({"huggingFace": {"token": "x", "existingSecret": "hf"}}, "huggingFace: give one of"),
    ({"autoscaling": {"kind": "hpa", "min": 5}}, "autoscaling.min: 5 is more than autoscaling.max, 4"),
    ({"ingress": {"enabled": True}}, "ingress.hosts: name at least one host"),
    ({"gateway": {"enabled": True}}, "gateway.parentRefs: name the Gateway"),
    ({"ingress": {"enabled": True, "hosts": ["a.example"]}}, "config.security.trusted_proxies: behind an"),
    ({"gateway": {"enabled": True, "parentRefs": [{"name": "a"}]}}, "config.security.trusted_proxies"),
    ({"config": {"security": {"api_keys": "sk-a"}}}, "config.security.api_keys: a ConfigMap is no place"),
    ({"config": {"storage": {"url": "redis://:password@redis"}}}, "config.storage.url: a ConfigMap is no"),
    # What the schema refuses:
    ({"replica": 2}, "replica"),
    ({"replicas": "2"}, "replicas"),
    ({"gpus": 2}, "gpus"),
    ({"sharedMemory": "8GB"}, "sharedMemory"),
    ({"device": "tpu"}, "'cuda', 'cpu'"),
    ({"autoscaling": {"kind": "cpu"}}, "'none', 'hpa', 'keda'"),
    ({"redis": {"image": "redis:latest"}}, "image"),
    ({"redis": {"url": "http://redis"}}, "url"),
    ({"redis": {"maxMemory": "512Mi"}}, "maxMemory"),
    ({"startupMinutes": 0}, "startupMinutes"),
    ({"config": {"server": 8000}}, "server"),
]


@pytest.mark.parametrize(("values", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_wrong_values_are_refused(render: Render, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused) as refused:
        render(values)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        merged(RWX, {"replicas": 2, "redis": {"deploy": True}, "config": {"security": {"max_in_flight": 6}}}),
        merged(RWX, {"replicas": 2, "redis": {"deploy": True}, "apiKeys": {"file": KEYS}}),
        {"apiKeys": {"file": KEYS}},
        merged(RWX, {"replicas": 2, "apiKeys": {"file": "keys: []"}}),
        {"config": {"engine": {"tensor_parallel_size": 4}}, "gpu": {"count": 4}},
        {"replicas": 2, "weights": {"from": "emptyDir"}},
        {"preset": "demo", "device": "cpu", "replicas": 2},
        {"config": {"storage": {"url": "redis://redis:6379"}}},
        {"preset": "", "config": {"model": {"name": "/models/mine"}}},
        {"monitoring": {"kind": "ServiceMonitor"}},
        {"image": {"digest": "sha256:" + "0" * 64}},
    ],
    ids=str,
)
def test_right_ones_are_not(render: Render, values: dict[str, Any]) -> None:
    assert render(values)


def test_the_schema_knows_every_value() -> None:
    """And no other: one without a place in the schema would be refused, one without a default forgotten."""
    schema = read(CHART / "values.schema.json")
    free = {"config", "resources", "nodeSelector", "affinity"}

    def compare(name: str, values: dict[str, Any], schema: dict[str, Any]) -> None:
        known = schema.get("properties")
        if known is None or name.rpartition(".")[2] in free:
            return
        assert schema["additionalProperties"] is False
        assert known.keys() - {"global"} == values.keys(), name
        for key, value in values.items():
            if isinstance(value, dict):
                compare(f"{name}.{key}", value, known[key])

    compare("", read(CHART / "values.yaml"), schema)
