"""Dashboard and alerts: a real Prometheus, which scraped the real server, has data for each expression."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ..conftest import SCRAPER, ServerProcess
from ..test_metrics import prometheus
from .conftest import CHART, NAMESPACE, Render, of_kind, read, seconds

LABELS = {"namespace": NAMESPACE, "pod": "demo-gemma-serve-7c9f8d6b5-x2x4z"}
"""What the Prometheus operator gives to what it scrapes."""

DASHBOARD: dict[str, Any] = json.loads((CHART / "dashboards" / "gemma-serve.json").read_text(encoding="utf8"))
README = (CHART / "README.md").read_text(encoding="utf8")
ALERTS: list[dict[str, Any]] = read(CHART / "alerts" / "gemma-serve.yaml")["groups"][0]["rules"]


def shown() -> list[str]:
    """The dashboard's expressions, its variables as Grafana fills them in."""
    texts = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    for variable in DASHBOARD["templating"]["list"]:
        if found := re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]):
            texts.append(found[1])
    filled = {"$namespace": LABELS["namespace"], "$pod": ".*", "$__rate_interval": "1m"}
    for name, value in filled.items():
        texts = [text.replace(name, value) for text in texts]
    assert not [text for text in texts if "$" in text]
    return texts


def alert_parts(render: Render) -> dict[str, str]:
    """Each alert's expression less its last comparison, which no healthy server fulfils."""
    (rule,) = of_kind(render({"monitoring": {"alerts": True}}), "PrometheusRule")
    parts = {}
    for alert in rule["spec"]["groups"][0]["rules"]:
        found = re.fullmatch(r"(.*) [<>] [\d.]+", " ".join(alert["expr"].split()))
        assert found, f"{alert['alert']} does not end in one comparison"
        parts[alert["alert"]] = found[1]
    return parts


@pytest.fixture(scope="module")
def queries(
    live: ServerProcess, render: Render, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A Prometheus that has scraped the live server before, while and after it worked."""
    folder = tmp_path_factory.mktemp("prometheus")
    body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16, "ignore_eos": True}
    with (
        prometheus(folder, live.url.removeprefix("http://"), SCRAPER, LABELS) as url,
        httpx.Client(base_url=url) as client,
        httpx.Client(base_url=live.url, timeout=120) as server,
    ):
        deadline = time.monotonic() + 120
        scraped = "min(count_over_time(gemma_engine_state[2m]))"
        for seen in (2, 4):
            while int((values(client, scraped) or ["0"])[0]) < seen:
                stream = server.post("/v1/chat/completions", json=body | {"stream": True})
                assert stream.status_code == 200
                assert time.monotonic() < deadline, (folder / "prometheus.log").read_text()
        yield client


def values(client: httpx.Client, query: str) -> list[str]:
    try:
        reply = client.get("/api/v1/query", params={"query": query}).json()
    except (httpx.TransportError, ValueError):  # not up yet
        return []
    assert reply["status"] == "success", f"{query}: {reply}"
    return [sample["value"][1] for sample in reply["data"]["result"]]


@pytest.mark.slow
@pytest.mark.parametrize("query", shown())
def test_every_panel_has_data(queries: httpx.Client, query: str) -> None:
    assert eventually(queries, query), f"no data for {query}"


@pytest.mark.slow
@pytest.mark.parametrize("alert", [alert["alert"] for alert in ALERTS])
def test_every_alert_has_data(queries: httpx.Client, render: Render, alert: str) -> None:
    query = alert_parts(render)[alert]
    assert eventually(queries, query), f"no data for {query}"


@pytest.mark.slow
def test_the_autoscalers_queries_have_data(queries: httpx.Client, render: Render) -> None:
    scaling = {"kind": "keda", "firstTokenSeconds": 2}
    access = {"weights": {"persistentVolumeClaim": {"accessMode": "ReadWriteMany"}}}
    (scaled,) = of_kind(render({"autoscaling": scaling}, access), "ScaledObject")
    triggers = scaled["spec"]["triggers"]
    assert len(triggers) == 3
    for trigger in triggers:
        assert len(eventually(queries, trigger["metadata"]["query"])) == 1
    for query in adapter_queries().values():
        assert len(eventually(queries, query)) == 1


def adapter_queries() -> dict[str, str]:
    """What prometheus-adapter asks, with the rules of the chart's README, for each metric of a pod."""
    (text,) = re.findall(r"^```yaml\n(rules:.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    pod = ",".join(f'{label}="{value}"' for label, value in LABELS.items())
    queries = {}
    for rule in yaml.safe_load(text)["rules"]["custom"]:
        query = rule["metricsQuery"].replace("<<.LabelMatchers>>", pod).replace("<<.GroupBy>>", "pod")
        queries[rule["name"]["as"]] = query.replace("<<.Series>>", rule["seriesQuery"].partition("{")[0])
    return queries


def test_the_hpa_counts_what_keda_counts(render: Render) -> None:
    access = {"weights": {"persistentVolumeClaim": {"accessMode": "ReadWriteMany"}}}
    limits = {"waitingRequests": 6, "kvCachePercent": 70, "firstTokenSeconds": 1.5}
    (scaler,) = of_kind(render({"autoscaling": {"kind": "hpa", **limits}}, access), "HorizontalPodAutoscaler")
    metrics = [metric["pods"] for metric in scaler["spec"]["metrics"]]
    wanted = [metric["target"]["averageValue"] for metric in metrics]
    assert wanted == ["6", "700m", "1.5"]
    (scaled,) = of_kind(render({"autoscaling": {"kind": "keda", **limits}}, access), "ScaledObject")
    triggers = [trigger["metadata"] for trigger in scaled["spec"]["triggers"]]
    assert [trigger["threshold"] for trigger in triggers] == ["6", "70", "1.5"]
    for metric, trigger in zip(metrics, triggers, strict=True):
        query = adapter_queries()[metric["metric"]["name"]]
        assert series(query) == series(trigger["query"])


def series(query: str) -> list[str]:
    return re.findall(r"[\w:]+(?=\{)", query)


@pytest.mark.slow
def test_a_healthy_server_rings_no_alarm(queries: httpx.Client, render: Render) -> None:
    (rule,) = of_kind(render({"monitoring": {"alerts": True}}), "PrometheusRule")
    slow = {"GemmaFirstTokenSlow", "GemmaQueueGrowing"}  # on a busy machine
    for alert in rule["spec"]["groups"][0]["rules"]:
        if alert["alert"] in slow:
            continue
        deadline = time.monotonic() + 30
        while rings := values(queries, alert["expr"]):  # a scrape of a busy machine may have failed
            assert time.monotonic() < deadline, (alert["alert"], rings)
            time.sleep(0.2)


def eventually(client: httpx.Client, query: str) -> list[str]:
    """A rate wants two scrapes."""
    deadline = time.monotonic() + 20
    while not (found := values(client, query)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def test_prometheus_takes_the_rules(render: Render, tmp_path: Path) -> None:
    run = promtool(tmp_path, rule_file(render, tmp_path), "check", "rules")
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(ALERTS)} rules found" in run.stdout


SERIES: dict[str, list[tuple[str, str]]] = {
    "GemmaEngineDown": [('gemma_engine_state{%s,state="dead"}', "1x120")],
    "GemmaNotReady": [('gemma_engine_state{%s,state="ready"}', "0x120")],
    "GemmaNotScraped": [("up{%s}", "0x120")],
    "GemmaEngineStalled": [('gemma_engine_state{%s,state="stalled"}', "1x120")],
    "GemmaEngineRestarts": [("gemma_engine_restarts_total{%s}", "0+1x120")],
    "GemmaErrorRate": [
        ('http_requests_total{%s,endpoint="/v1/chat/completions",status="200"}', "0+60x120"),
        ('http_requests_total{%s,endpoint="/v1/chat/completions",status="500"}', "0+30x120"),
    ],
    "GemmaFirstTokenSlow": [
        ('gemma_time_to_first_token_seconds_bucket{%s,model="m",le="5"}', "0+1x120"),
        ('gemma_time_to_first_token_seconds_bucket{%s,model="m",le="10"}', "0+60x120"),
        ('gemma_time_to_first_token_seconds_bucket{%s,model="m",le="+Inf"}', "0+60x120"),
    ],
    "GemmaKVCacheFull": [("vllm:kv_cache_usage_perc{%s}", "0.99x120")],
    "GemmaQueueGrowing": [("gemma_queue_length{%s}", "0+30x120")],
    "GemmaRefusesWork": [('gemma_limit_rejections_total{%s,reason="queue_requests"}', "0+30x120")],
}
"""A sick server, minute by minute."""


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_the_alert_rings(render: Render, tmp_path: Path, alert: dict[str, Any]) -> None:
    """Prometheus's own simulation: of one sick server it does, of another release's it does not."""
    name = alert["alert"]
    rules = rule_file(render, tmp_path)
    labels = ",".join(f'{label}="{value}"' for label, value in LABELS.items())
    others = labels.replace("demo-gemma-serve", "other-gemma-serve")
    for given, rings in ((labels, True), (others, False)):
        series = [{"series": text % given, "values": numbers} for text, numbers in SERIES[name]]
        test = {
            "interval": "1m",
            "input_series": series,
            "promql_expr_test": [
                {"expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})', "eval_time": "90m"}
                | ({"exp_samples": [{"labels": "{}", "value": 1}]} if rings else {"exp_samples": []})
            ],
        }
        (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": [rules.name], "tests": [test]}))
        run = promtool(tmp_path, tmp_path / "test.yaml", "test", "rules")
        assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("minutes", [5, 45])
def test_a_server_may_take_its_time_to_start(render: Render, minutes: int) -> None:
    (rule,) = of_kind(render({"monitoring": {"alerts": True}, "startupMinutes": minutes}), "PrometheusRule")
    (alert,) = [alert for alert in rule["spec"]["groups"][0]["rules"] if alert["alert"] == "GemmaNotReady"]
    assert seconds(alert["for"]) == 60 * minutes
    assert not re.search(r"\$(selector|startup)", str(rule))


def rule_file(render: Render, folder: Path) -> Path:
    (rule,) = of_kind(render({"monitoring": {"alerts": True}}), "PrometheusRule")
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump(rule["spec"]), encoding="utf8")
    return path


def promtool(folder: Path, file: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *command, file.name], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_alerts_say_what_to_do() -> None:
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert alert["annotations"].keys() == {"summary", "description"}


def test_only_our_metrics_are_named() -> None:
    """The dashboard's metrics are in README.md's table, or vLLM's."""
    table = (CHART.parent.parent / "README.md").read_text(encoding="utf8")
    for query in shown():
        for name in re.findall(r"\b((?:gemma|http|model|active|memory|cpu)_\w+?)(?:_bucket)?\{", query):
            assert f"`{name}`" in table, name


def test_panels_are_laid_out() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
