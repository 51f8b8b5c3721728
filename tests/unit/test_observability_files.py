"""The dashboard and the alerts ask for what the server tells: every metric, label and label value of every query."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse_text

from serving.families import FAMILIES
from serving.metrics import REASONS, Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
BOARD = json.loads((DEPLOY / "grafana" / "noria-serving.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "noria-alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
CONFIG = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
TARGET = {"job", "instance"}
"""Labels that Prometheus adds to what it scrapes."""
VARIABLES = {"$__rate_interval": "5m", "$job": ".*", "$workload": ".*"}

PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
ANNOTATIONS = [one for one in BOARD["annotations"]["list"] if "expr" in one]
QUERIES = [
    *((f"panel {title}", target["expr"], target["legendFormat"]) for title, target in TARGETS),
    *((f"annotation {one['name']}", one["expr"], one["titleFormat"]) for one in ANNOTATIONS),
    *((f"alert {rule['alert']}", rule["expr"], rule["annotations"]["summary"]) for rule in RULES),
]


@pytest.fixture(scope="module")
def exposed():
    """Sample name -> label -> values, of a server to which everything happened that it counts."""
    metrics = Metrics(None, "one")
    metrics.loaded("taxi", 3, "CPUExecutionProvider")
    metrics.batch("taxi", 3, ["infer", "predict"], [0.001, 0.002], [0.001, 0.001], rows=5, run=0.001)
    for status in (404, 500):
        metrics.answered("predict", "taxi", 3, status, 0.001)
    metrics.answered("feedback", "taxi", 3, 200, 0.001, 2)
    metrics.queued("taxi", 2)
    metrics.swapped("taxi", "serving", 2.0)
    metrics.shadowed("taxi", 4, scored=1, dropped=1)
    metrics.shadow_stands("taxi", failed=False, restarts=0)
    metrics.shadow_waits("taxi", 10, time.time() - 5)
    metrics.log_lag("taxi", 10, 1, time.time() - 5)
    metrics.log_synced(0.001)
    metrics.connected(1)
    found = defaultdict(lambda: defaultdict(set))
    silent = []
    for family in parse_text(metrics.page()[0].decode()):
        if not family.samples:
            silent.append(family.name)
        for sample in family.samples:
            found[sample.name]["job"].add("noria")
            for label, value in sample.labels.items():
                found[sample.name][label].add(value)
    assert not silent, f"call what makes these count: {silent}"
    found["up"]["job"].add("noria")
    return found


def parsed(query):
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query
    return promql.parse(query)


def labels_of(node, exposed):
    """The labels of a query's result; asserts on the way that whatever it names is there."""
    if isinstance(node, promql.VectorSelector):
        assert node.name in exposed, f"there is no metric {node.name}"
        held = exposed[node.name]
        for matcher in node.matchers.matchers:
            assert matcher.name in {*held, *TARGET}, f"{node.name} has no label {matcher.name}"
            pattern = matcher.value if matcher.op == promql.MatchOp.Re else re.escape(matcher.value)
            assert matcher.op in (promql.MatchOp.Re, promql.MatchOp.Equal)
            parts = pattern.split("|")  # each alternative must be a value, or a pattern of some
            for part in parts if len(parts) > 1 and ".*" not in parts else [pattern]:
                assert any(re.fullmatch(part, value) for value in held[matcher.name]), f"{matcher.name}={part!r}: never"
        return {*held, *TARGET}
    if isinstance(node, promql.MatrixSelector):
        return labels_of(node.vector_selector, exposed)
    if isinstance(node, promql.ParenExpr | promql.UnaryExpr | promql.SubqueryExpr):
        return labels_of(node.expr, exposed)
    if isinstance(node, promql.Call):
        found = set().union(*(labels_of(argument, exposed) for argument in node.args))
        if node.func.name == "histogram_quantile":
            assert "le" in found, "a quantile needs the label le"
            found -= {"le"}
        return found
    if isinstance(node, promql.AggregateExpr):
        inner = labels_of(node.expr, exposed)
        if node.modifier is None:
            return set()
        assert "by" in str(node.modifier.type).lower()
        assert set(node.modifier.labels) <= inner, f"no such labels: {set(node.modifier.labels) - inner}"
        return set(node.modifier.labels)
    if isinstance(node, promql.BinaryExpr):
        sides = [labels_of(side, exposed) for side in (node.lhs, node.rhs)]
        numbers = [isinstance(side, promql.NumberLiteral) for side in (node.lhs, node.rhs)]
        if any(numbers):
            return sides[numbers.index(False)]
        if node.modifier is not None and node.modifier.matching is not None:
            assert set(node.modifier.matching.labels) <= sides[0] & sides[1]
        else:
            assert sides[0] == sides[1], f"the sides of {node.op} never match: {sides}"
        return sides[0]
    assert isinstance(node, promql.NumberLiteral), f"{type(node).__name__}: teach this test what it is"
    return set()


@pytest.mark.parametrize(("where", "query", "text"), QUERIES, ids=[where for where, *_ in QUERIES])
def test_queries_ask_for_what_is_told(exposed, where, query, text):
    found = labels_of(parsed(query), exposed)
    shown = set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", text))
    assert shown <= found, f"{where} shows {shown - found}, which its query does not give"


@pytest.mark.parametrize(
    ("query", "part"),
    [
        ("rate(noria_request_total[5m])", "no metric"),
        ("sum by (version) (noria_queue_requests)", "no such labels"),
        ('noria_swaps_total{status="fail"}', "never"),
        ('noria_refusals_total{reason=~"queue_full|late"}', "never"),
        ('noria_queue_requests{model="taxi"}', "no label"),
        ("histogram_quantile(0.5, sum by (workload) (rate(noria_batch_rows_bucket[5m])))", "label le"),
        ("noria_queue_requests / noria_log_lag_seconds{} / noria_connections", "never match"),
    ],
)
def test_a_wrong_query_would_be_found(exposed, query, part):
    with pytest.raises(AssertionError, match=part):
        labels_of(parsed(query), exposed)


def test_the_dashboard_shows_every_metric():
    """Whoever adds a metric adds where it is looked at."""
    queries = " ".join(query for _, query, _ in QUERIES) + json.dumps(BOARD["templating"])
    unseen = {family.name for family in FAMILIES if not re.search(rf"\b{family.name}(_bucket|_sum|_count)?\b", queries)}
    assert unseen == {
        "process_virtual_memory_bytes", "process_start_time_seconds", "process_max_fds",  # for other dashboards
    }  # fmt: skip


def test_the_dashboard_can_be_imported(exposed):
    assert BOARD["id"] is None and BOARD["uid"] == "noria-serving"
    variables = {one["name"]: one for one in BOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    for panel in [*PANELS, *ANNOTATIONS]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for one in variables.values():
        if one["type"] == "query":
            asked = re.fullmatch(r"label_values\((.*), (\w+)\)", one["query"]["query"])
            assert asked[2] in labels_of(parsed(asked[1]), exposed)
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD))) - {"__rate_interval", "__all"}
    assert used == set(variables)
    numbers = [panel["id"] for panel in BOARD["panels"]]
    assert len(numbers) == len(set(numbers)) > 20
    places = [tuple(panel["gridPos"][side] for side in "xywh") for panel in BOARD["panels"]]
    cells = [(x + i, y + j) for x, y, w, h in places for i in range(w) for j in range(h)]
    assert len(cells) == len(set(cells)), "panels overlap"


def test_alerts_say_what_to_do():
    names = [rule["alert"] for rule in RULES]
    assert len(names) == len(set(names)) >= 8
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["action"].endswith(".")
    (job,) = CONFIG["scrape_configs"]
    assert job["job_name"] == "noria" and job["metrics_path"] == "/metrics"
    assert CONFIG["rule_files"] == ["noria-alerts.yml"]


def test_what_is_rare_begins_at_zero(exposed):
    """Prometheus sees no increase in the first sample of a series: the first failed swap would make no alarm."""
    assert exposed["noria_swaps_total"]["status"] == {"serving", "failed"}
    assert exposed["noria_refusals_total"]["reason"] == REASONS


@pytest.fixture
def promtool():
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus); the rules were parsed only.")

    def call(*arguments):
        ended = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr

    return call


def test_promtool_takes_the_files(promtool):
    promtool("check", "rules", DEPLOY / "prometheus" / "noria-alerts.yml")
    promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")


def test_alerts_fire_when_they_should(promtool):
    promtool("test", "rules", Path(__file__).parents[1] / "alerts.yml")


def test_promtool_takes_the_page(promtool):
    metrics = Metrics(None, "one")
    metrics.batch("taxi", 3, ["infer"], [0.001], [0.001], rows=5, run=0.001)
    ended = subprocess.run(
        [shutil.which("promtool"), "check", "metrics"],
        input=metrics.page()[0],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, b"")
