"""What every rendered server must keep to, whatever the preset."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma_serve import __version__
from gemma_serve.settings import Settings, StorageSettings, all_variables

from ..conftest import ROOT
from .conftest import (
    CHART,
    EVERYTHING,
    NAMESPACE,
    PRESETS,
    RELEASE,
    Manifest,
    Render,
    component,
    container,
    of_kind,
    pods,
    read,
    servers,
    settings_file,
)
from .test_manifests import CASES


@pytest.fixture(params=CASES, scope="module")
def manifests(request: pytest.FixtureRequest, render: Render) -> list[Manifest]:
    return render(CASES[request.param])


def load(manifests: list[Manifest], folder: Path) -> Settings:
    """The settings as the server of these manifests reads them."""
    text = yaml.safe_dump(settings_file(manifests))
    for mount, secret in mounted_secrets(servers(manifests)[0]).items():
        if secret == "certificate":  # is not the chart's, and has what a Secret of its type has
            for name in ("tls.crt", "tls.key"):
                (folder / name).touch()
                text = text.replace(f"{mount}/{name}", str(folder / name))
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf8")
    environ = {
        item["name"]: item.get("value", "redis://from-a-secret")
        for item in container(servers(manifests)[0])["env"]
    }
    environ |= {"GEMMA_ENGINE_NODE_RANK": "0"} if "GEMMA_ENGINE_NODE_RANK" in environ else {}
    return Settings.load(config=path, environ=environ, env_file=None)


def mounted_secrets(pod: Manifest) -> dict[str, str]:
    """Where the server finds the files of which Secret."""
    volumes = {
        volume["name"]: volume.get("secret", {}).get("secretName") for volume in pod["spec"]["volumes"]
    }
    mounts = container(pod)["volumeMounts"]
    found = {mount["mountPath"]: volumes[mount["name"]] for mount in mounts if volumes[mount["name"]]}
    assert all(mount["readOnly"] for mount in mounts if mount["mountPath"] in found)
    return found


def test_the_server_takes_its_settings(manifests: list[Manifest], tmp_path: Path) -> None:
    settings = load(manifests, tmp_path)
    assert settings.server.host == "0.0.0.0"
    for pod in pods(manifests):
        for item in [item for each in pod["spec"]["containers"] for item in each.get("env", [])]:
            if item["name"].startswith("GEMMA_"):
                assert item["name"] in all_variables()


def test_the_pod_outlives_its_drain(manifests: list[Manifest], tmp_path: Path) -> None:
    server = load(manifests, tmp_path).server
    for pod in pods(manifests):
        if component(pod) in ("server", "node"):
            command = container(pod).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
            pause = int(command[1]) if command else 0
            needed = pause + server.drain_delay_seconds + server.shutdown_timeout_seconds
            assert pod["spec"]["terminationGracePeriodSeconds"] >= needed + 30
            assert server.drain_delay_seconds >= 10  # endpoints and load balancers lag


def test_the_grace_period_follows_the_settings(render: Render) -> None:
    pause = {"preStopSeconds": 7}
    drain = {"config": {"server": {"drain_delay_seconds": 0.5, "shutdown_timeout_seconds": 600}}}
    (pod,) = servers(render(pause, drain))
    assert pod["spec"]["terminationGracePeriodSeconds"] == 7 + 1 + 600 + 30


def test_probes(manifests: list[Manifest], tmp_path: Path) -> None:
    settings = load(manifests, tmp_path)
    for pod in servers(manifests):
        server = container(pod)
        (port,) = server["ports"]
        assert port == {"name": "http", "containerPort": settings.server.port}
        scheme = "HTTPS" if settings.server.tls_certificate else "HTTP"
        for probe, path in (("startup", "ready"), ("readiness", "ready"), ("liveness", "live")):
            asked = server[f"{probe}Probe"]["httpGet"]
            assert asked == {"path": f"/health/{path}", "port": "http", "scheme": scheme}
            assert asked["path"] in settings.security.public_paths  # the kubelet has no key
        startup = server["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
        # A frozen engine is the server's own business first; the kubelet's much later.
        liveness = server["livenessProbe"]
        assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60


def test_rollouts_take_nothing_away(manifests: list[Manifest]) -> None:
    for deployment in of_kind(manifests, "Deployment"):
        spec = deployment["spec"]
        startup = container(servers(manifests)[0])["startupProbe"]
        longest = startup["periodSeconds"] * startup["failureThreshold"]
        downloads = 3600 if servers(manifests)[0]["spec"].get("initContainers") else 0
        assert spec["progressDeadlineSeconds"] == longest + downloads + 600
        assert spec["strategy"] == {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
        }
    for scaler in (*of_kind(manifests, "HorizontalPodAutoscaler"), *of_kind(manifests, "ScaledObject")):
        target = scaler["spec"]["scaleTargetRef"]
        (scaled,) = [
            each for each in of_kind(manifests, target["kind"]) if each["metadata"]["name"] == target["name"]
        ]
        assert "replicas" not in scaled["spec"]  # an upgrade would undo what the autoscaler did


def test_gpus_are_what_the_engine_needs(manifests: list[Manifest], tmp_path: Path) -> None:
    settings = load(manifests, tmp_path)
    engine = settings.engine
    sizes = [engine.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline", "data")]
    for pod in pods(manifests):
        for each in pod["spec"]["containers"]:
            gpus = each["resources"]["limits"].get("nvidia.com/gpu", 0)
            if component(pod) not in ("server", "node") or settings.model.name == "gemma-demo":
                assert gpus == 0
            else:
                assert gpus * engine.get("nnodes", 1) == sizes[0] * sizes[1] * sizes[2]
            assert each["resources"]["limits"]["memory"]
            assert each["resources"]["requests"]["memory"]


def test_the_nodes_of_an_engine_are_set_up_alike(render: Render) -> None:
    manifests = render(read(CHART / "values-multinode.yaml"))
    leader, node = pods(of_kind(manifests, "LeaderWorkerSet"))
    assert container(leader)["args"] == ["serve", *container(node)["args"][1:]]
    assert container(node)["args"][0] == "node"
    assert container(leader)["env"] == container(node)["env"]
    assert container(leader)["resources"] == container(node)["resources"]
    assert not any("Probe" in name for name in container(node))  # it answers nobody
    engine = settings_file(manifests)["engine"]
    assert engine["nnodes"] == engine["pipeline_parallel_size"] == 2  # across nodes, as README.md advises
    assert container(node)["resources"]["limits"]["nvidia.com/gpu"] == engine["tensor_parallel_size"]
    (service,) = of_kind(manifests, "Service")
    selector = service["spec"]["selector"].items()
    assert selector <= leader["metadata"]["labels"].items()
    assert not selector <= node["metadata"]["labels"].items()


def test_pod_security_is_restricted(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
        for each in (*spec.get("initContainers", []), *spec["containers"]):
            context = each["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert not any("hostPort" in port for port in each.get("ports", []))
        kinds = {kind for volume in spec.get("volumes", []) for kind in volume if kind != "name"}
        asked_for = {"hostPath"} if component(pod) in ("server", "node") else set()
        assert kinds <= {"configMap", "emptyDir", "secret", "persistentVolumeClaim", "image"} | asked_for


def test_only_one_case_asks_for_a_folder_of_the_node(render: Render) -> None:
    for case in (name for name in CASES if name != "everything else"):
        volumes = [volume for pod in pods(render(CASES[case])) for volume in pod["spec"].get("volumes", [])]
        assert not any("hostPath" in volume for volume in volumes)


def test_images_are_pinned_and_ours_is_this_version(manifests: list[Manifest], tmp_path: Path) -> None:
    demo = load(manifests, tmp_path).model.name == "gemma-demo"
    for pod in pods(manifests):
        for each in (*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]):
            assert re.search(r":\d[\w.-]*$|@sha256:[0-9a-f]{64}$", each["image"]), each["image"]
            if component(pod) != "redis":
                assert each["image"] == f"gemma-serve:{__version__}{'-cpu' if demo else ''}"


def test_the_charts_version_is_ours() -> None:
    chart = read(CHART / "Chart.yaml")
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


def test_what_is_written_goes_to_volumes(manifests: list[Manifest]) -> None:
    for pod in (pod for pod in pods(manifests) if component(pod) in ("server", "node")):
        mounts = {mount["mountPath"]: mount["name"] for mount in container(pod)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert {"/tmp", "/cache", "/dev/shm"} <= mounts.keys()
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        for item in container(pod)["env"]:
            if item["name"] == "HF_HOME" or item["name"].endswith(("_CACHE_ROOT", "_CACHE_DIR")):
                assert any(item["value"].startswith(f"{path}/") for path in mounts)
        assert mounts.keys() <= {
            "/tmp",
            "/cache",
            "/dev/shm",
            "/models",
            "/etc/gemma-serve",
            "/etc/gemma-serve-keys",
            "/etc/gemma-serve-tls",
        }
        assert set(mounts.values()) == volumes.keys()


def variables(container: Manifest) -> dict[str, Any]:
    return {item["name"]: item.get("value") or item["valueFrom"] for item in container["env"]}


@pytest.mark.parametrize("case", ["weights from an image", "weights that are there"])
def test_weights_that_cannot_be_written_are_not_downloaded(render: Render, case: str) -> None:
    (pod,) = servers(render(CASES[case], {"huggingFace": {"token": "hf_x"}}))
    server = container(pod)
    assert variables(server)["HF_HUB_OFFLINE"] == "1" and "HF_TOKEN" not in variables(server)
    (mount,) = [mount for mount in server["volumeMounts"] if mount["name"] == "weights"]
    assert mount["readOnly"] is True
    assert "initContainers" not in pod["spec"]


def test_whoever_downloads_has_the_token(render: Render) -> None:
    token = {"huggingFace": {"existingSecret": "hf"}}
    (pod,) = servers(render(token))
    (download,) = pod["spec"]["initContainers"]
    assert variables(download)["HF_TOKEN"]["secretKeyRef"] == {"name": "hf", "key": "HF_TOKEN"}
    assert "HF_HUB_OFFLINE" not in variables(download)
    assert "HF_TOKEN" not in variables(container(pod))
    (pod,) = servers(render(token, {"weights": {"download": "none"}}))  # the server itself
    assert variables(container(pod))["HF_TOKEN"] and "HF_HUB_OFFLINE" not in variables(container(pod))


def test_servers_wait_for_the_job_that_downloads(render: Render) -> None:
    values = {"config": {"engine": {"revision": "1e6"}}}
    manifests = render(EVERYTHING, values)
    (job,) = [pod for pod in pods(manifests) if component(pod) == "download"]
    (download,) = job["spec"]["containers"]
    assert download["command"] == ["hf", "download"]
    assert download["args"] == ["google/gemma-3-4b-it", "--revision", "1e6"]
    (pod,) = servers(manifests)
    (wait,) = pod["spec"]["initContainers"]
    assert wait["args"] == download["args"] and "HF_TOKEN" not in variables(wait)
    assert variables(container(pod))["HF_HUB_OFFLINE"] == "1"


def test_the_wait_ends_when_the_model_is_there(render: Render, tmp_path: Path) -> None:
    """Its shell, with an `hf` that has all of the model the third time it is asked."""
    (wait,) = servers(render(EVERYTHING))[0]["spec"]["initContainers"]
    calls = tmp_path / "calls"
    for name, script in {
        "hf": f'echo "$HF_HUB_OFFLINE $*" >> {calls}; test $(wc -l < {calls}) -eq 3',
        "sleep": "true",
        "tini": 'shift; exec "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([*wait["command"], *wait["args"]], env=environ, check=True, timeout=30)
    assert calls.read_text().splitlines() == ["1 download google/gemma-3-4b-it"] * 3


def test_secrets_are_only_in_secrets(render: Render) -> None:
    values = {"huggingFace": {"token": "hf_verysecret"}, "redis": {"url": "redis://:verysecret@redis:6379"}}
    for manifest in render(values, {"weights": {"download": "none"}}):
        assert ("verysecret" in str(manifest)) == (manifest["kind"] == "Secret")


def test_secrets_that_exist_are_used(render: Render) -> None:
    secrets = {
        name: {"existingSecret": f"my-{name}", "secretKey": "x"}
        for name in ("redis", "apiKeys", "huggingFace")
    }
    manifests = render(secrets)
    assert not of_kind(manifests, "Secret")
    (pod,) = servers(manifests)
    text = yaml.safe_dump(pod)
    for name in secrets:
        assert f"my-{name}" in text


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"model": {"max_length": 4096}}},
        {"preset": "gemma-3-12b"},
        {"redis": {"url": "redis://other"}},
    ],
    ids=str,
)
def test_a_changed_setting_is_a_rollout(render: Render, change: dict[str, Any]) -> None:
    def template(*values: Manifest) -> Manifest:
        return dict(servers(render({"redis": {"url": "redis://one"}}, *values))[0])

    assert template() == template()
    assert template() != template(change)


def test_edited_keys_are_no_rollout(render: Render) -> None:
    """The server reads them again by itself."""
    first, second = (
        servers(render({"apiKeys": {"file": text}}))[0]
        for text in ("keys: []", "keys: [{name: a, sha256: b}]")
    )
    assert first == second


def test_presets_of_the_chart_are_those_of_the_server(render: Render) -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        values = {"preset": path.stem, "config": {"server": None, "health": None, "log": None}}
        device = {"device": "cpu"} if path.stem == "demo" else {}
        assert settings_file(render(values, device)) == read(path)


def test_the_weights_may_be_all_that_is_in_the_volume(render: Render) -> None:
    image = {"from": "image", "image": {"reference": "example.com/weights:1"}, "download": "none"}
    for name in ("/models", "/models/"):
        assert pods(render({"weights": image, "config": {"model": {"name": name}}}))


def test_keys_that_are_no_keys_are_for_the_server_to_refuse(render: Render) -> None:
    shared = {"persistentVolumeClaim": {"accessMode": "ReadWriteMany"}}
    for text in ("keys: 5", "keys: [abc]", "keys: [{name: a, limits: null}]", "5"):
        assert pods(render({"replicas": 2, "weights": shared, "apiKeys": {"file": text}}))


def test_traffic_is_let_through_where_it_must(render: Render) -> None:
    manifests = render(EVERYTHING)
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(manifests, "NetworkPolicy")}
    ours, redis = policies["demo-gemma-serve"], policies["demo-gemma-serve-redis"]
    covered = ours["podSelector"]["matchExpressions"][0]["values"]
    for pod in pods(manifests):
        assert component(pod) in [*covered, "redis", "test"]
    assert {"port": 53, "protocol": "UDP"} in ways_out(ours) and {"port": 53, "protocol": "TCP"} in ways_out(
        ours
    )
    assert {"port": 443} in ways_out(ours) and {"port": 4317} in ways_out(ours)
    to_redis = [rule for rule in ours["egress"] if rule["ports"][0]["port"] == 6379]
    labels = to_redis[0]["to"][0]["podSelector"]["matchLabels"].items()
    (redis_pod,) = [pod for pod in pods(manifests) if component(pod) == "redis"]
    assert labels <= redis_pod["metadata"]["labels"].items()
    let_in = redis["ingress"][0]["from"][0]["podSelector"]["matchLabels"].items()
    assert let_in <= servers(manifests)[0]["metadata"]["labels"].items()
    assert redis["egress"] if "egress" in redis else redis["policyTypes"] == ["Ingress", "Egress"]


def our_policy(manifests: list[Manifest]) -> Manifest:
    (policy,) = [
        policy["spec"]
        for policy in of_kind(manifests, "NetworkPolicy")
        if "matchExpressions" in policy["spec"]["podSelector"]
    ]
    return dict(policy)


def ways_out(policy: Manifest) -> list[Manifest]:
    return [port for rule in policy["egress"] for port in rule.get("ports", [])]


def test_the_policy_is_about_the_servers_port(manifests: list[Manifest]) -> None:
    policy = our_policy(manifests)
    (port,) = container(servers(manifests)[0])["ports"]
    assert policy["ingress"][0]["ports"] == [{"port": port["name"]}]
    assert {rule["port"] for rule in ways_out(policy)} >= {53, 443}


@pytest.mark.parametrize(
    ("values", "port"),
    [
        ({"redis": {"deploy": True}}, 6379),
        ({"redis": {"existingSecret": "x"}}, 6379),
        ({"redis": {"url": "redis://shared"}}, 6379),
        ({"redis": {"url": "rediss://user:pass:1@shared:6380/0"}}, 6380),
        ({"redis": {"url": "redis://[fd00::1]:7000?db=1"}}, 7000),
        ({"redis": {"url": "redis://[fd00::1]/0"}}, 6379),
        ({"config": {"storage": {"url": "redis://shared:7001/0"}}}, 7001),
        ({}, None),
    ],
    ids=str,
)
def test_redis_is_let_through_at_its_port(render: Render, values: Manifest, port: int | None) -> None:
    found = [rule["port"] for rule in ways_out(our_policy(render(values)))]
    assert found == [53, 53, 443] + [port] * (port is not None)


def test_who_may_connect(render: Render) -> None:
    def rule(*values: Manifest) -> Manifest:
        return dict(our_policy(render(*values))["ingress"][0])

    assert rule()["from"] == [{"namespaceSelector": {}}]
    for kind in ("LoadBalancer", "NodePort"):  # their clients are no pods
        assert "from" not in rule({"service": {"type": kind}})
    peer = {"namespaceSelector": {"matchLabels": {"team": "a"}}}
    given, test = rule({"networkPolicy": {"from": [peer]}, "service": {"type": "LoadBalancer"}})["from"]
    assert given == peer
    (pod,) = [pod for pod in pods(render()) if component(pod) == "test"]
    assert test["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_redis_ends_before_the_limit_of_its_memory_does(render: Render) -> None:
    """What is kept takes half of it at most: the copy that writes the log anew may take as much again."""
    (redis,) = of_kind(render(EVERYTHING), "StatefulSet")
    (one,) = redis["spec"]["template"]["spec"]["containers"]
    given = dict(itertools.pairwise(one["args"]))
    assert given["--maxmemory"] == "512mb" and given["--maxmemory-policy"] == "volatile-lru"
    assert one["resources"]["limits"]["memory"] == "1Gi"


@pytest.mark.parametrize(("answer", "status"), [("PONG", 0), ("LOADING Redis is loading the dataset", 1)])
def test_redis_is_not_ready_while_it_loads(render: Render, tmp_path: Path, answer: str, status: int) -> None:
    (redis,) = of_kind(render(EVERYTHING), "StatefulSet")
    (one,) = redis["spec"]["template"]["spec"]["containers"]
    (tmp_path / "redis-cli").write_text(f"#!/bin/sh\necho '{answer}'\n")
    (tmp_path / "redis-cli").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        run = subprocess.run(one[probe]["exec"]["command"], env=environ, timeout=30)
        assert run.returncode == status


def test_an_ingress_speaks_to_the_server_as_it_listens(render: Render) -> None:
    for values, protocol in ({}, "HTTP"), ({"tls": {"existingSecret": "certificate"}}, "HTTPS"):
        for ingress in of_kind(render(EVERYTHING, values), "Ingress"):
            given = ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/backend-protocol"]
            assert given == protocol


def test_a_certificate_comes_from_its_secret(render: Render, tmp_path: Path) -> None:
    manifests = render({"tls": {"existingSecret": "certificate"}})
    (pod,) = servers(manifests)
    (mount,) = [path for path, secret in mounted_secrets(pod).items() if secret == "certificate"]
    given = settings_file(manifests)["server"]
    assert (given["tls_certificate"], given["tls_private_key"]) == (f"{mount}/tls.crt", f"{mount}/tls.key")
    assert load(manifests, tmp_path).server.tls_certificate == tmp_path / "tls.crt"
    assert container(pod)["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
    other = {"tls_certificate": f"{mount}/chain.pem", "tls_private_key": f"{mount}/key.pem"}
    manifests = render({"tls": {"existingSecret": "certificate"}, "config": {"server": other}})
    assert other.items() <= settings_file(manifests)["server"].items()


def test_every_selector_finds_the_servers_alone(manifests: list[Manifest]) -> None:
    kinds = ("Deployment", "PodMonitor")
    selectors = [
        each["spec"]["selector"]["matchLabels"] for kind in kinds for each in of_kind(manifests, kind)
    ]
    services = [each for each in of_kind(manifests, "Service") if "redis" not in each["metadata"]["name"]]
    selectors += [service["spec"]["selector"] for service in services]
    for selector, pod in itertools.product(selectors, pods(manifests)):
        found = selector.items() <= pod["metadata"]["labels"].items()
        assert found == (component(pod) == "server")
    for monitor in of_kind(manifests, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        found = [
            each for each in of_kind(manifests, "Service") if wanted <= each["metadata"]["labels"].items()
        ]
        assert found == services


def test_node_drains_take_one_pod_of_the_engines_at_a_time(manifests: list[Manifest]) -> None:
    (budget,) = of_kind(manifests, "PodDisruptionBudget")
    selector = budget["spec"]["selector"]
    (expression,) = selector["matchExpressions"]
    for pod in pods(manifests):
        labels = pod["metadata"]["labels"]
        found = labels[expression["key"]] in expression["values"]
        assert (found and selector["matchLabels"].items() <= labels.items()) == (
            component(pod) in ("server", "node")
        )


def test_only_the_gpus_toleration_is_left_out_on_a_cpu(render: Render) -> None:
    def given(*values: Manifest) -> list[Manifest]:
        return list(servers(render(*values))[0]["spec"]["tolerations"])

    gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    mine = {"key": "team", "operator": "Equal", "value": "a"}
    cpu = read(CHART / "values-cpu-demo.yaml")
    assert given() == [gpu] and given(cpu) == []
    assert given({"tolerations": [gpu, mine]}) == [gpu, mine]
    assert given(cpu, {"tolerations": [gpu, mine, {"operator": "Exists"}]}) == [mine, {"operator": "Exists"}]


@pytest.mark.parametrize("redis", [{"deploy": True}, {"url": "redis://shared:6379"}, {"existingSecret": "x"}])
def test_releases_that_share_a_redis_have_keys_of_their_own(render: Render, redis: Manifest) -> None:
    def given(*values: Manifest) -> dict[str, str | None]:
        (pod,) = servers(render(read(CHART / "values-cpu-demo.yaml"), *values))
        return {item["name"]: item.get("value") for item in container(pod)["env"]}

    name = "GEMMA_STORAGE_PREFIX"
    prefix = given({"redis": redis})[name]
    assert prefix is not None and prefix.startswith(f"{NAMESPACE}.{RELEASE}")
    assert StorageSettings(prefix=prefix).prefix == prefix
    assert name not in given({"redis": redis, "config": {"storage": {"prefix": "ours"}}})
    assert name not in given()


def test_every_preset_has_its_line() -> None:
    text = (CHART / "README.md").read_text(encoding="utf8")
    for path in PRESETS:
        assert f"`{path.name}`" in text


def test_the_charts_readme_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CHART.parent))
    from readme import README, readme

    assert README.read_text(encoding="utf8") == readme(), "run `make chart-readme`"


def test_every_value_has_its_comment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CHART.parent))
    from readme import values

    documented = {name for name, _, _ in values()}

    def leaves(name: str, value: Any) -> list[str]:
        if name in documented or not isinstance(value, dict) or not value:
            return [name]
        return [leaf for key, item in value.items() for leaf in leaves(f"{name}.{key}".lstrip("."), item)]

    missing = [name for name in leaves("", read(CHART / "values.yaml")) if name not in documented]
    assert not missing
