"""The chart under Helm itself: every value set renders, and Kubernetes' schemas take the result."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from server.settings import Settings, read_settings

CHART = Path(__file__).parents[2] / "deploy" / "helm"
VALUES = sorted((CHART / "ci").glob("*.yaml"))
# Custom resources: their schemas come with their operators, not with Kubernetes.
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}


@pytest.fixture(scope="module")
def chart() -> Iterator[Any]:
    with helm_python.Chart.load(str(CHART)) as loaded:
        yield loaded


def render(chart: Any, values: dict[str, Any]) -> list[dict[str, Any]]:
    """Every manifest, as a document."""
    files = chart.render(values, name="demo", namespace="models")
    return [
        document
        for name, text in files.items()
        if name.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]


def values_of(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text()) or {}


def of_kind(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [d for d in documents if d["kind"] == kind]
    return found


def container(documents: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = of_kind(documents, "Deployment")["spec"]["template"]["spec"]
    return found["containers"][0]


@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_every_value_set_renders_what_kubernetes_takes(chart: Any, path: Path) -> None:
    """A misspelt field is dropped by the API server in silence, the security context first."""
    documents = render(chart, values_of(path))
    assert {d["kind"] for d in documents} >= {"Deployment", "Service", "ServiceAccount"}
    for document in documents:
        assert document["metadata"]["labels"]["app.kubernetes.io/instance"] == "demo"
        if document["kind"] not in CUSTOM:
            kubernetes_validate.validate(document, "1.37", strict=True)


def test_the_schemas_notice_a_misspelt_field(chart: Any) -> None:
    """A validation that takes everything looks like a sound chart."""
    document = of_kind(render(chart, {}), "Deployment")
    document["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, "1.37", strict=True)


def test_everything_is_on_in_production(chart: Any) -> None:
    """A template behind a switch that no test turns is not tested."""
    documents = render(chart, values_of(CHART / "ci" / "production.yaml"))
    kinds = {d["kind"] for d in documents}
    assert kinds >= CUSTOM | {"PodDisruptionBudget", "NetworkPolicy", "ConfigMap"}
    dashboards = [d for d in documents if d["kind"] == "ConfigMap"]
    assert len(dashboards) == 3
    assert all(d["metadata"]["labels"]["grafana_dashboard"] == "1" for d in dashboards)
    scaled = of_kind(documents, "ScaledObject")["spec"]
    assert "hneurons_requests_waiting" in scaled["triggers"][0]["metadata"]["query"]
    behaviour = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behaviour["scaleDown"]["stabilizationWindowSeconds"] >= 600


def test_rules_are_the_tested_ones(chart: Any, rules: list[Any], tmp_path: Path) -> None:
    """A copy in the chart would drift from the rules that promtool has seen firing."""
    documents = render(chart, values_of(CHART / "ci" / "production.yaml"))
    groups = of_kind(documents, "PrometheusRule")["spec"]["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    key = ("record", "alert")
    assert sorted(str(rule.get(k)) for rule in found for k in key) == sorted(
        str(rule.get(k)) for rule in rules for k in key
    )
    links = {rule["annotations"]["runbook_url"] for rule in found if "alert" in rule}
    assert all(link.startswith("https://git.example.org/hneurons/blob/main/docs") for link in links)
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": groups}))
    checked = subprocess.run(
        ["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_the_server_takes_the_arguments(
    chart: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flag that the server does not know is a crash loop."""
    arguments = container(render(chart, values_of(path)))["args"]
    settings = read_settings(arguments)
    assert isinstance(settings, Settings)
    assert (settings.port, settings.metrics_port) == (8000, 9400)
    for flag, value in values_of(path).get("settings", {}).items():
        found = getattr(settings, flag.replace("-", "_"))
        assert found == (tuple(value) if isinstance(value, list) else value), flag


@pytest.mark.parametrize("path", VALUES, ids=lambda path: path.stem)
def test_the_pod_may_do_next_to_nothing(chart: Any, path: Path) -> None:
    """Whoever breaks into the process finds no root, no token, no writable system."""
    documents = render(chart, values_of(path))
    pod = of_kind(documents, "Deployment")["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    rights = container(documents)["securityContext"]
    assert rights["readOnlyRootFilesystem"] is True
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}


def test_a_long_load_and_a_slow_drain_are_waited_for(chart: Any) -> None:
    """Kubernetes kills what it was not told to wait for, in the middle of a load or a stream."""
    documents = render(chart, {})
    startup = container(documents)["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800
    pod = of_kind(documents, "Deployment")["spec"]["template"]["spec"]
    settings = read_settings(container(documents)["args"])
    grace = pod["terminationGracePeriodSeconds"]
    command = container(documents)["lifecycle"]["preStop"]["exec"]["command"]
    assert command == ["sleep", "5"]
    assert settings.drain_delay == 0  # it serves on while its address leaves the Service
    assert grace > 5 + settings.drain_timeout + 5


@pytest.mark.parametrize(
    ("values", "strategy"),
    [
        ({}, "RollingUpdate"),
        ({"cache": {"size": "1Gi"}}, "Recreate"),
        ({"cache": {"size": "1Gi", "accessMode": "ReadWriteMany"}, "replicas": 3}, "RollingUpdate"),
        ({"cache": {"existingClaim": "models"}, "replicas": 3}, "RollingUpdate"),
        ({"strategy": {"type": "Recreate"}}, "Recreate"),
    ],
)
def test_an_upgrade_does_not_wait_for_a_volume_that_the_old_pod_holds(
    chart: Any, values: dict[str, Any], strategy: str
) -> None:
    """A new pod on another node cannot mount it, and the old one waits for the new one."""
    deployment = of_kind(render(chart, values), "Deployment")
    assert deployment["spec"]["strategy"]["type"] == strategy


def test_a_pod_computes_with_the_cores_that_it_asks_for(chart: Any) -> None:
    """Torch counts the cores of the node: two replicas on one node stand in each other's way."""
    found = container(render(chart, {}))
    threads = {one["name"]: one.get("value") for one in found["env"]}["OMP_NUM_THREADS"]
    assert threads == found["resources"]["requests"]["cpu"]


@pytest.mark.parametrize(
    "values",
    [
        {"replicaCount": 2},
        {"settings": {"api-keys": "secret"}},
        {"settings": {"port": 80}},
        {"image": {"digest": "sha256:short"}},
        {"audit": {"enabled": True}},
        {"cache": {"size": "1Gi"}, "replicas": 2},
        {"cache": {"size": "1Gi"}, "replicas": 2, "strategy": {"type": "RollingUpdate"}},
        {"autoscaling": {"enabled": True, "prometheusAddress": "http://p", "minReplicas": 0}},
        {"autoscaling": {"enabled": True}},
        {"model": ""},
    ],
)
def test_wrong_values_are_refused(chart: Any, values: dict[str, Any]) -> None:
    """A misspelt value that is ignored is a setting that somebody believes in."""
    with pytest.raises(helm_python.HelmError):
        render(chart, values)
