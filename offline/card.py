"""README.md of a probe, written from the numbers of its card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from probes.calibration import OperatingPoint
from probes.card import EvaluationRow, ProbeCard

_SHOWN = ("auroc", "auroc_within_units", "auprc", "recall_at_5_fpr")


def readme(card: ProbeCard, probe_id: str) -> str:
    """Markdown; every figure comes from the card."""
    return "\n".join(
        [
            f"# Probe `{probe_id}`",
            "",
            f"Reads {_neurons(card)} of {card.model.model_id} ({card.model.dtype}, "
            f"{card.model.num_layers} layers of {card.model.intermediate_size} neurons) and gives "
            "every token the risk that it belongs to a made-up claim. Risk lies in [0, 1]; higher "
            "is worse. It is an estimate for the kind of data below, nothing more.",
            "",
            "## What it is not good for",
            "",
            *(f"- {sentence}" for sentence in card.not_good_for),
            "",
            "## Thresholds",
            "",
            "Of tokens (false-positive rate among held-out tokens that make no wrong claim):",
            "",
            *_points(card.token.operating_points, card.token.default),
            "",
            f"Of responses (pooling: {card.response.pooling.kind}, window "
            f"{card.response.pooling.window}; false-positive rate among right and ordinary ones):",
            "",
            *_points(card.response.operating_points, card.response.default),
            "",
            "## Evaluation",
            "",
            "On relations and questions that were neither fitted nor calibrated on, but for rows "
            'named "folds of the fit part", by which the number of neurons was chosen. In brackets '
            "the 95 % interval, resampled by relation or question; of random neurons, where 95 % "
            "of the draws lie. All detectors are oriented so that higher means more likely made "
            "up.",
            "",
            *_evaluation(card.evaluation),
            "",
            "## Calibration",
            "",
            "| level | mean risk | observed | n |",
            "|---|---|---|---|",
            *(
                f"| {b.level} | {b.mean_risk:.3f} | {b.frequency:.3f} | {b.n} |"
                for b in card.reliability
            ),
            "",
            "## How it was made",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in card.training.items() if value),
            *(f"| {key} | {value} |" for key, value in card.libraries.items()),
            f"| created | {card.created} |",
            "",
        ]
    )


def _neurons(card: ProbeCard) -> str:
    return f"{card.training['neurons']} feed-forward neurons"


def _points(points: Sequence[OperatingPoint], default: str) -> list[str]:
    return [
        "| name | threshold | false-positive rate | recall |",
        "|---|---|---|---|",
        *(
            f"| {p.name}{' (default)' if p.name == default else ''} | {p.threshold:.4f} "
            f"| {p.false_positive_rate:.3f} | {p.recall:.3f} |"
            for p in points
        ),
    ]


class EvaluationTable(NamedTuple):
    """The rows of one data set: detectors down, metrics across."""

    dataset: str
    n: int
    metrics: tuple[str, ...]
    figures: dict[str, tuple[EvaluationRow | None, ...]]  # detector -> one per metric


def evaluation_tables(rows: Iterable[EvaluationRow]) -> list[EvaluationTable]:
    """One table per data set, in the order of the rows."""
    found: dict[str, dict[str, dict[str, EvaluationRow]]] = {}
    for row in rows:
        found.setdefault(row.dataset, {}).setdefault(row.detector, {})[row.metric] = row
    tables = []
    for dataset, detectors in found.items():
        metrics = {metric: None for row in detectors.values() for metric in row}
        ordered = tuple(m for m in _SHOWN if m in metrics) or tuple(metrics)
        tables.append(
            EvaluationTable(
                dataset,
                n=next(iter(next(iter(detectors.values())).values())).n,
                metrics=ordered,
                figures={
                    detector: tuple(figures.get(metric) for metric in ordered)
                    for detector, figures in detectors.items()
                },
            )
        )
    return tables


def _evaluation(rows: Iterable[EvaluationRow]) -> list[str]:
    lines: list[str] = []
    for table in evaluation_tables(rows):
        lines += [f"**{table.dataset}** (n = {table.n})", ""]
        lines += [f"| detector | {' | '.join(table.metrics)} |"]
        lines += ["|---" * (len(table.metrics) + 1) + "|"]
        for detector, figures in table.figures.items():
            lines.append(f"| {detector} | {' | '.join(map(cell, figures))} |")
        lines.append("")
    return lines


def cell(row: EvaluationRow | None) -> str:
    """A figure with its interval, as card and report print it."""
    if row is None:
        return "-"
    interval = "" if row.low is None else f" [{row.low:.3f}, {row.high:.3f}]"
    return f"{row.value:.3f}{interval}"
