"""Dashboards as Grafana finds them when it starts; their queries are tested against Prometheus
(tests/contract/service/deploy)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

DASHBOARDS = sorted((Path(__file__).parents[2] / "deploy/grafana/dashboards").glob("*.json"))
SOURCE = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_fits_any_grafana(path: Path) -> None:
    """Links and alerts name a uid; a data source of the author's own leaves every panel empty."""
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"] == path.stem
    assert dashboard.get("id") is None
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    assert variables["DS_PROMETHEUS"]["type"] == "datasource"
    asked = [v for v in variables.values() if v["type"] == "query"]
    for asker in (*dashboard["panels"], *asked):
        assert asker["datasource"] == SOURCE, asker
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_quality_shows_distributions_as_heat_maps() -> None:
    """A mean of risks hides the few that matter."""
    (quality,) = (json.loads(p.read_text()) for p in DASHBOARDS if p.stem == "hneurons-quality")
    heat = [panel for panel in quality["panels"] if panel["type"] == "heatmap"]
    assert len(heat) == 2
    assert all("_risk_ratio_bucket" in panel["targets"][0]["expr"] for panel in heat)
