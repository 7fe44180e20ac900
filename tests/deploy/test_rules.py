"""Recording and alert rules under promtool: they parse, fire when they should, and clear."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

CASES = sorted((Path(__file__).parent / "prometheus").glob("*.test.yml"))


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=200
    )


@pytest.fixture
def bare_rules(rule_files: list[Path], tmp_path: Path) -> Path:
    """The rules without annotations, beside the cases: promtool would compare every sentence."""
    for file in rule_files:
        content = yaml.safe_load(file.read_text())
        for group in content["groups"]:
            for rule in group["rules"]:
                rule.pop("annotations", None)
        (tmp_path / file.name).write_text(yaml.safe_dump(content))
    for case in CASES:
        (tmp_path / case.name).write_text(case.read_text())
    return tmp_path


def test_rules_are_sound(rule_files: list[Path]) -> None:
    """Prometheus refuses to start with a rule that does not parse, alerts and all."""
    assert [file.name for file in rule_files] == ["alerts.rules.yml", "recording.rules.yml"]
    checked = promtool("check", "rules", "--lint=all", "--lint-fatal", *rule_files)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_fires_and_clears(bare_rules: Path) -> None:
    """An alert that never fires is a promise; one that never clears is switched off by hand."""
    tested = promtool("test", "rules", *(bare_rules / case.name for case in CASES))
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_a_wrong_threshold_turns_the_rule_tests_red(bare_rules: Path) -> None:
    """Rule tests that pass whatever the rules say protect nothing."""
    alerts = bare_rules / "alerts.rules.yml"
    alerts.write_text(alerts.read_text().replace("psi_1h > 0.25", "psi_1h > 25"))
    assert promtool("test", "rules", bare_rules / "hours.test.yml").returncode != 0


def test_a_hang_is_looked_for_while_it_lasts(rule_files: list[Path]) -> None:
    """The process ends itself after --heartbeat. promtool looks at every group as often as it is
    told to, so the group's own interval is read here."""
    groups = [g for file in rule_files for g in yaml.safe_load(file.read_text())["groups"]]
    (group,) = [
        g for g in groups if "HNeuronsEngineStalled" in {rule.get("alert") for rule in g["rules"]}
    ]
    assert group["interval"] == "10s"
    assert "for" not in group["rules"][0]


def test_no_alert_is_without_a_case(rules: list[dict[str, Any]]) -> None:
    """A new alert that nobody has seen firing, or clearing, is found out at night."""
    seen: dict[str, set[bool]] = defaultdict(set)
    tests = [test for file in CASES for test in yaml.safe_load(file.read_text())["tests"]]
    for case in (case for test in tests for case in test["alert_rule_test"]):
        seen[case["alertname"]].add(bool(case["exp_alerts"]))
    alerts = {rule["alert"] for rule in rules if "alert" in rule}
    assert len(alerts) >= 12
    assert seen == {alert: {True, False} for alert in alerts}


def test_every_alert_leads_to_a_remedy(rules: list[dict[str, Any]], repository: Path) -> None:
    """Who is woken needs a severity, a picture and the steps to take."""
    runbook = (repository / "docs" / "runbook.md").read_text()
    headings = set(re.findall(r"^## (\w+)$", runbook, re.MULTILINE))
    uids = {path.stem for path in (repository / "deploy" / "grafana").rglob("*.json")}
    alerts = [rule for rule in rules if "alert" in rule]
    assert headings == {rule["alert"] for rule in alerts}
    for rule in alerts:
        name = rule["alert"]
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}, name
        notes = rule["annotations"]
        assert notes["runbook_url"] == f"docs/runbook.md#{name.lower()}"
        assert notes["dashboard"] in uids, name
        assert notes["summary"], name


def test_shares_have_a_traffic_floor(rules: list[dict[str, Any]]) -> None:
    """One failed request at night is 100 %; it must not wake anybody."""
    shares = [
        rule["alert"]
        for rule in rules
        if "alert" in rule
        and re.search(r"ratio_rate|psi_", rule["expr"])
        and not re.search(r"rate5m > 0\.1\b|\]\)\) > (?:0\.)?1\b", rule["expr"])
    ]
    assert shares == ["HNeuronsMeterSlow"]  # its time only runs while requests do
