"""A real Prometheus scrapes a real server: rules have values, alerts fire and clear."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

# What the fake engine's probe was calibrated on: one character in ten is a digit.
ORDINARY = "the year of this coin is 1969 or so, the clerk said"
DIGITS = "0123456789 42 1969 2001 31415"


@pytest.fixture(scope="module")
def stage(
    start_in: Any, start_prometheus: Any, tools: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """A server that takes one request at a time and queues none, traffic, and Prometheus."""
    folder = tmp_path_factory.mktemp("stage")
    flags = ("--max-num-seqs", "2", "--max-waiting-requests", "0")
    with (
        start_in(folder, *flags) as server,
        start_prometheus(folder, [server.port]) as prometheus,
        tools.Traffic(server.port, ORDINARY) as traffic,
    ):
        yield SimpleNamespace(server=server, prometheus=prometheus, traffic=traffic)


def metric_uses(expression: str) -> set[tuple[str, tuple[str, ...]]]:
    """(metric, labels of its selector) of every selector in a PromQL expression."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    found = re.findall(r"\b((?:hneurons|process|vllm)[_:][\w:]+|up|ALERTS)\b(?:\{([^}]*)\})?", bare)
    return {(name, tuple(re.findall(r"(\w+)\s*[=!]", labels))) for name, labels in found}


def grouping(expression: str) -> set[str]:
    """Labels in `by`, `on` and `without` clauses."""
    clauses = re.findall(r"\b(?:by|on|without)\s*\(([^)]*)\)", expression)
    return {label.strip() for clause in clauses for label in clause.split(",") if label.strip()}


def dashboard_expressions(repository: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((repository / "deploy" / "grafana" / "dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield f"{path.stem}: {panel['title']}", target["expr"]
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                yield f"{path.stem}: ${variable['name']}", variable["query"]["query"]
        for annotation in dashboard["annotations"]["list"]:
            yield f"{path.stem}: {annotation['name']}", annotation["expr"]


def test_every_recording_rule_has_values(stage: Any, tools: Any, repository: Path) -> None:
    """A rule over a metric that nobody exports is green for ever."""
    text = (repository / "deploy" / "prometheus" / "recording.rules.yml").read_text()
    names = re.findall(r"record: (\S+)", text)
    assert len(names) >= 14
    for name in names:
        samples = tools.wait_for(lambda name=name: stage.prometheus.query(name), name)
        assert samples[0]["metric"]["model_name"] == "m"
    scored = stage.prometheus.query("sum(hneurons:token_flagged:ratio_rate1h)")
    assert 0 < float(scored[0]["value"][1]) < 1


def test_every_expression_names_what_is_exported(stage: Any, tools: Any, repository: Path) -> None:
    """A renamed metric leaves an empty panel that looks like a quiet night."""
    rules = [
        (rule.get("record") or rule["alert"], rule["expr"])
        for path in (repository / "deploy" / "prometheus").glob("*.rules.yml")
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]
    expressions = [*rules, *dashboard_expressions(repository)]
    assert len(expressions) > 60
    used = {metric for _, expression in expressions for metric, _ in metric_uses(expression)}
    for recorded in sorted(metric for metric in used if ":" in metric):
        tools.wait_for(lambda name=recorded: stage.prometheus.query(name), recorded)
    known: dict[str, set[str]] = {}
    for series in stage.prometheus.get("series", **{"match[]": '{__name__=~".+"}'}):
        known.setdefault(series["__name__"], set()).update(series)
    for where, expression in expressions:
        for metric, labels in metric_uses(expression):
            if metric == "ALERTS":
                continue
            assert metric in known, f"{where}: {metric} is not exported"
            assert set(labels) <= known[metric], f"{where}: {metric} lacks one of {labels}"
        labels_of_all = set().union(
            *(known.get(metric, set()) for metric, _ in metric_uses(expression))
        )
        assert grouping(expression) <= labels_of_all, where


def test_every_panel_query_is_valid(stage: Any, repository: Path, tools: Any) -> None:
    """Grafana shows a broken query as a small red corner; Prometheus says what is wrong."""
    for where, expression in dashboard_expressions(repository):
        if expression.startswith("label_values("):
            expression = expression.removeprefix("label_values(").rpartition(",")[0]
        expression = re.sub(r"\$(model_name|probe|instance)", ".+", expression)
        expression = tools.faster(expression.replace("$__rate_interval", "1m"))
        assert stage.prometheus.query(expression) is not None, where


def fires_and_clears(stage: Any, tools: Any, alert: str, begin: Any, end: Any) -> None:
    assert alert not in stage.prometheus.firing()
    begin()
    try:
        tools.wait_for(lambda: alert in stage.prometheus.firing(), f"{alert} fires")
    finally:
        end()
    tools.wait_for(lambda: alert not in stage.prometheus.firing(), f"{alert} clears")


@pytest.mark.parametrize(
    ("alert", "content"),
    [
        ("HNeuronsScoresUnavailable", "[nan:2]ab"),
        ("HNeuronsErrors", "[fail:2]ab"),
        ("HNeuronsDrift", DIGITS),
    ],
)
def test_an_alert_fires_for_its_fault_and_clears(
    stage: Any, tools: Any, alert: str, content: str
) -> None:
    """Rule tests feed made-up series; this is the fault itself, seen through the whole chain."""
    fires_and_clears(
        stage,
        tools,
        alert,
        lambda: setattr(stage.traffic, "content", content),
        lambda: setattr(stage.traffic, "content", ORDINARY),
    )


def test_overload_fires_and_clears(stage: Any, tools: Any) -> None:
    """The refusals of a full queue must be seen, whoever sends the requests."""
    slow = "[slow:100][loop]tick"
    crowd = [tools.Traffic(stage.server.port, slow, risk=False) for _ in range(3)]

    def begin() -> None:
        for one in crowd:
            one.__enter__()

    def end() -> None:
        stage.server.client.get("/livez")
        for one in crowd:
            one.content = "a"
        for one in crowd:
            one.__exit__()

    fires_and_clears(stage, tools, "HNeuronsOverloaded", begin, end)


def test_a_server_that_stands_still_is_down_until_it_goes_on(stage: Any, tools: Any) -> None:
    """A process that exists and does not answer is down as well."""
    fires_and_clears(
        stage,
        tools,
        "HNeuronsDown",
        lambda: stage.server.process.send_signal(signal.SIGSTOP),
        lambda: stage.server.process.send_signal(signal.SIGCONT),
    )
