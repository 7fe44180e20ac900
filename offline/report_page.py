"""report.json as one self-contained HTML page: no script, no font, no address of anybody else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from offline import report_charts as charts
from offline.card import cell, evaluation_tables
from offline.report import Report

LEVELS = ("answers", "claims", "tokens")
TEMPLATES = Path(__file__).parent / "templates"


def render(report: Report) -> str:
    """The page; every figure on it is one of `report`."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = cell
    datasets = [
        name
        for name in dict.fromkeys(curve.dataset for curve in report.curves)
        if "balanced" not in name  # a part of the set of the same name
    ]
    tables = evaluation_tables(report.rows)
    ranked = [table for table in tables if "auroc" in table.metrics]
    headline = _headline([table.dataset for table in ranked])
    crossvalidated = evaluation_tables(
        report.crossvalidation.rows if report.crossvalidation else ()
    )
    shown = {(table.dataset, metric) for table in tables for metric in table.metrics}
    return environment.get_template("report.html").render(
        report=report,
        neuron_map=charts.neuron_map(report),
        budgets=charts.budgets(report),
        curves={name: charts.curves(report, name) for name in datasets},
        reliability=charts.reliability(report),
        ranked=ranked,
        headline=headline,
        crossvalidated=[table for table in crossvalidated if table.dataset in headline],
        remaining=[row for row in report.rows if (row.dataset, row.metric) not in shown],
        others=[table for table in tables if "auroc" not in table.metrics],
        doses=charts.doses(report.sweep) if report.sweep else {},
    )


def _headline(datasets: Sequence[str]) -> set[str]:
    """The first two data sets of each level; the rest is detail."""
    unseen = [dataset for dataset in datasets if not dataset.endswith("folds of the fit part")]
    found = {level: [d for d in unseen if d.startswith(f"{level}, ")] for level in LEVELS}
    return {dataset for names in found.values() for dataset in names[:2]}
