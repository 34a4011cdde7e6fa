"""What the dashboard and the rules ask for is what a running service tells, by the same names and labels."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import httpx
import pytest
import torch
import yaml

from serve_app.core.errors import every_error
from serve_app.core.metrics import EncoderMetrics, IngressMetrics, UsageMetrics
from tests.deployments.conftest import MINILM, ROOT, LiveServer

DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana.json").read_text())
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((ROOT / "deploy" / "prometheus-rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]
QUERIES = [*(target["expr"] for panel in PANELS for target in panel["targets"]), *VARIABLES]
GPU = ("ray_serve_app_gpu_", "ray_node_gpus_")  # told where there is one

WORDS = re.compile(r'"[^"]*"|[a-zA-Z_:][a-zA-Z0-9_:]*|[0-9][a-z0-9.]*|\$\w+|[{}()\[\],]|[=!~<>+*/%^-]+|\S')
KEYWORDS = {"and", "or", "unless", "bool", "offset"}
GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}


@dataclass(frozen=True)
class Query:
    """Its metrics, the labels that each must have, and what labels are held against."""

    metrics: frozenset[str]
    labels: frozenset[str]
    equal: frozenset[tuple[str, str]]


def read(expression: str) -> Query:
    """Every name is a function, a keyword, a metric or a label, and its place tells which: nothing is passed over."""
    metrics, labels, equal = set[str](), set[str](), set[tuple[str, str]]()
    words = WORDS.findall(expression.replace("label_values(", "label_values by("))
    inside = "("
    for at, word in enumerate(words):
        after = words[at + 1] if at + 1 < len(words) else ""
        if word in "([{":
            inside = "by" if at and words[at - 1] in GROUPING else word
        elif word in ")]}":
            inside = "("
        elif not re.match(r"[a-zA-Z_]", word) or inside == "[":
            continue
        elif inside == "{":
            labels.add(word)
            equal |= {(word, words[at + 2].strip('"'))} if after == "=" else set()
        elif inside == "by" and not word.startswith("ray_"):
            labels.add(word)
        elif after != "(" and word not in KEYWORDS | GROUPING and not _is_call(words, at):
            metrics.add(word)
    return Query(frozenset(metrics), frozenset(labels), frozenset(equal))


def _is_call(words: list[str], at: int) -> bool:
    """An aggregation's name: its grouping stands between it and what it adds up."""
    return at + 1 < len(words) and words[at + 1] in GROUPING


def asked() -> dict[str, set[str]]:
    """By metric, the labels that it must have; of what rules record, those of the rule."""
    recorded = {rule["record"]: read(rule["expr"]) for rule in RULES if "record" in rule}
    wanted: dict[str, set[str]] = defaultdict(set)
    for expression in (*QUERIES, *(rule["expr"] for rule in RULES)):
        query = read(expression)
        for metric in query.metrics:
            if ":" in metric:
                assert query.labels <= recorded[metric].labels, f"{metric} has no such label: {expression}"
            else:
                wanted[metric] |= query.labels
    return wanted


def own() -> set[str]:
    """As Prometheus has them."""
    kinds = (IngressMetrics(), EncoderMetrics(), UsageMetrics())
    series = [series for kind in kinds for metric in kind.all() for series in metric.series]
    return {f"ray_{each.name}_total" if each.adds else f"ray_{each.name}" for each in series}


def test_the_reader_finds_what_is_there() -> None:
    query = read('histogram_quantile(0.9, sum by (le, a) (rate(x_total{b=~"c", d="e"}[5m]))) > 1 and absent(y:z)')
    assert query == Query(
        frozenset({"x_total", "y:z"}), frozenset("leabd") - {"l", "e"} | {"le"}, frozenset({("d", "e")})
    )
    assert read("label_values(ray_x, model)").labels == {"model"}
    assert read("label_values(ray_x, model)").metrics == {"ray_x"}


def test_every_metric_of_ours_is_looked_at() -> None:
    shown = set(asked())
    families = {re.sub(r"_(bucket|sum|count)_total$", "", name) for name in own()}
    assert not {family for family in families if not any(name.startswith(family) for name in shown)}
    assert {name for name in shown if name.startswith("ray_serve_app_")} <= own()


def test_rules_ask_for_codes_that_there_are() -> None:
    codes = {kind.code for kind in every_error()}
    found = {value for rule in RULES for label, value in read(rule["expr"]).equal if label == "code"}
    assert found
    assert found <= codes


def test_the_dashboard_loads_as_it_is() -> None:
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", DASHBOARD["uid"])
    assert DASHBOARD["schemaVersion"] >= 36, "data sources are objects since"
    assert "id" not in DASHBOARD, "an instance's own number"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    (source,) = [variable for variable in DASHBOARD["templating"]["list"] if variable["type"] == "datasource"]
    for panel in PANELS:
        assert panel["datasource"] == {"type": source["query"], "uid": f"${{{source['name']}}}"}
    for one, other in combinations((panel["gridPos"] for panel in DASHBOARD["panels"]), 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


def test_alerts_say_how_bad_it_is_and_what_it_is() -> None:
    for rule in RULES:
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert rule["annotations"]["summary"]


def _traffic(server: LiveServer) -> None:
    """Something of each kind that has a metric."""
    workspace = json.loads(server.command("workspace", "list", "--json").stdout)[0]["id"]
    slow = server.command("key", "create", workspace, "--requests-per-minute", "1").stdout.strip()
    body = {"model": MINILM["id"], "input": "a short text"}
    with httpx.Client(base_url=server.url, headers=server.headers, timeout=60) as http:
        for more in ({}, {"input": ["a long text " * 100, "a short one"]}, {"model": "none"}):
            http.post("/v1/embeddings", json=body | more)
        for _ in range(2):
            http.post("/v1/embeddings", json=body, headers={"Idempotency-Key": "watched"})
            http.post("/v1/embeddings", json=body, headers={"Authorization": f"Bearer {slow}"})


def _told(page: str) -> dict[str, set[str]]:
    """Each metric's labels."""
    told: dict[str, set[str]] = defaultdict(set)
    for name, labels in re.findall(r"^([a-zA-Z_:][\w:]*)(\{.*\})? ", page, re.MULTILINE):
        told[name] |= set(re.findall(r'[{,]([a-zA-Z_]\w*)="', labels))
    return told


@pytest.mark.live
@pytest.mark.timeout(700)
def test_a_running_service_tells_all_that_is_asked_for(server: LiveServer) -> None:
    _traffic(server)
    wanted = {name: labels for name, labels in asked().items() if torch.cuda.is_available() or not name.startswith(GPU)}
    missing, deadline = ["all"], time.monotonic() + 90
    while missing and time.monotonic() < deadline:  # processes tell Ray's agents every 10 s
        time.sleep(1)
        told = _told(server.metrics())
        missing = [
            f"{name}: {sorted(labels - told[name])}"
            for name, labels in wanted.items()
            if name not in told or labels - told[name]
        ]
    assert not missing
    page = server.metrics()
    assert re.search(r'^ray_serve_app_refusals_total\{.*budget="requests"', page, re.MULTILINE)
    assert re.search(r'^ray_serve_app_claims_total\{.*outcome="replay"', page, re.MULTILINE)
    assert re.search(r"^ray_serve_app_ledger_difference_events\{.*\} 0\.0$", page, re.MULTILINE)


@pytest.mark.live
@pytest.mark.timeout(700)
def test_each_request_has_a_line_in_the_log_and_no_more_than_it_may(server: LiveServer) -> None:
    marker = f"xyzzy-{time.monotonic_ns()}"
    with httpx.Client(base_url=server.url, headers=server.headers, timeout=60) as http:
        body = {"model": MINILM["id"], "input": f"a text with {marker}", "user": f"user {marker}"}
        headers = {"X-Request-Id": f"req-{time.monotonic_ns()}", "Idempotency-Key": f"order {marker}"}
        answer = http.post("/v1/embeddings", json=body, headers=headers)
        assert answer.status_code == 200

    def lines() -> list[dict[str, Any]]:
        files = [path for path in server.logs() if path.name.startswith("requests_")]
        told = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        return [line for line in told if line["request_id"] == headers["X-Request-Id"]]

    server.wait_until(lines, 30)
    (line,) = lines()
    assert (line["status"], line["code"], line["route"]) == (200, "ok", "/v1/embeddings")
    assert line["tokens"] == answer.json()["usage"]["total_tokens"]
    assert line["workspace"].startswith("ws_")
    assert line["key"].startswith("key_")
    assert line["total_ms"] >= line["compute_ms"] > 0
    assert not [str(path) for path in server.logs() if marker in path.read_text(errors="replace")]
