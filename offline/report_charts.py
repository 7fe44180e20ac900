"""The pictures of the report as SVG, drawn from report.json alone.

Text stays text and takes the colour of the page around it, so one picture does for light and dark.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from offline.curves import Curve
from offline.report import Report
from offline.sweep_answers import PROBED
from offline.sweep_figures import OVER_COMPLIANCE, RANDOM, SweepFigures

INK = "#123456"  # stands for the page's text colour until the SVG is written
PROBE, CONTROL = "#e0662f", "#8a8f98"
# Mid tones that stand out on white and on black; the probe is always the first.
COLOURS = (PROBE, "#3f8fd8", "#2fa36b", "#b06fd6", "#c9961a", CONTROL, "#d6618f")
CURVES_SHOWN = len(COLOURS)

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}


def neuron_map(report: Report) -> str:
    """Which neurons of which layers are read; beside it how many of each layer."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        where, count = figure.subplots(1, 2, width_ratios=(5, 1), sharey=True)
        for name, colour, chosen in (
            ("H-Neurons", PROBE, [n for n in report.neurons if n.is_h_neuron]),
            ("others", COLOURS[1], [n for n in report.neurons if not n.is_h_neuron]),
        ):
            where.scatter(
                [n.neuron for n in chosen],
                [n.layer for n in chosen],
                s=10,
                color=colour,
                label=f"{name} ({len(chosen)})",
            )
            layers = Counter(n.layer for n in chosen)
            left = [sum(n.layer == k and n.is_h_neuron for n in report.neurons) for k in layers]
            count.barh(
                list(layers),
                list(layers.values()),
                left=left if colour != PROBE else None,
                color=colour,
                height=0.8,
            )
        where.set(
            xlabel=f"neuron (of {report.model.intermediate_size})",
            ylabel=f"layer (of {report.model.num_layers})",
            xlim=(0, report.model.intermediate_size),
            ylim=(-0.8, report.model.num_layers - 0.2),
        )
        where.yaxis.set_major_locator(MaxNLocator(integer=True))
        count.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
        where.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        count.set(xlabel="neurons")
        return _svg(figure, "neurons")


def budgets(report: Report) -> str:
    """How good each number of neurons is on folds that it was not fitted on."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5, 2.8), layout="constrained")
        axes = figure.subplots()
        tried = sorted(report.budgets, key=lambda budget: budget.neurons)
        for name, colour in zip(tried[0].figures, COLOURS, strict=False):
            found = [budget.figures[name] for budget in tried]
            axes.plot([b.neurons for b in tried], found, "o-", color=colour, label=name)
        for budget in tried:
            if budget.chosen:
                axes.axvline(budget.neurons, color=CONTROL, linestyle=":", label="chosen")
        axes.set(xlabel="neurons", ylabel="AUROC, held-out folds")
        axes.legend()
        return _svg(figure, "budgets")


def curves(report: Report, dataset: str) -> str:
    """ROC, precision-recall and selective answering of the detectors of one data set."""
    shown = shown_curves(report, dataset)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.3), layout="constrained")
        roc, precision, selective = figure.subplots(1, 3)
        roc.plot([0, 1], [0, 1], color=CONTROL, linewidth=0.6, linestyle=":")
        for curve, colour in zip(shown, COLOURS, strict=False):
            style: dict[str, Any] = {
                "color": colour,
                "linewidth": 2.2 if curve.detector == "probe" else 1.2,
            }
            roc.plot(curve.false_positive_rate, curve.recall, label=curve.detector, **style)
            precision.plot(curve.recall[1:], curve.precision[1:], **style)
            selective.plot(curve.coverage[:-1], curve.accuracy[:-1], **style)
        share = shown[0].wrong / (shown[0].wrong + shown[0].right)
        precision.axhline(share, color=CONTROL, linewidth=0.6, linestyle=":")
        _unit(roc, "false-positive rate", "recall", "ROC")
        _unit(precision, "recall", "precision", "precision and recall")
        _unit(
            selective, "coverage: share not flagged", "faithful among them", "selective answering"
        )
        selective.autoscale(axis="y")
        figure.legend(loc="outside lower left", ncols=4)
        return _svg(figure, dataset)


def shown_curves(report: Report, dataset: str) -> list[Curve]:
    """The probe, then the strongest of the others by AUROC, each kind of layer once."""
    auroc = {
        r.detector: r.value for r in report.rows if (r.dataset, r.metric) == (dataset, "auroc")
    }
    found = [curve for curve in report.curves if curve.dataset == dataset]
    found.sort(key=lambda c: (c.detector != "probe", -auroc[c.detector]))
    kept: dict[str, Curve] = {}
    for curve in found:
        kept.setdefault(re.sub(r"\d+", "", curve.detector), curve)
    return list(kept.values())[:CURVES_SHOWN]


def reliability(report: Report) -> str:
    """Mean risk against observed frequency; the size of a dot is its number of rows."""
    with mpl.rc_context(_STYLE):
        levels = list(dict.fromkeys(b.level for b in report.reliability))
        figure = Figure(figsize=(3.2 * len(levels), 3), layout="constrained")
        for axes, level in zip(
            figure.subplots(1, len(levels), squeeze=False)[0], levels, strict=True
        ):
            bins = [b for b in report.reliability if b.level == level]
            axes.plot([0, 1], [0, 1], color=CONTROL, linewidth=0.6, linestyle=":")
            axes.plot([b.mean_risk for b in bins], [b.frequency for b in bins], "o-", color=PROBE)
            n = sum(b.n for b in bins)
            _unit(axes, "mean risk", "share hallucinated", f"{level} risk (n = {n})")
        return _svg(figure, "reliability")


def doses(sweep: SweepFigures) -> dict[str, str]:
    """Measure -> picture: what alpha does, then what it costs."""
    measures = dict.fromkeys(point.measure for point in sweep.points)
    wanted = {"complied": "Compliance", "correct": "Accuracy", "perplexity": "Perplexity"}
    wanted |= {"refused": "Refusals", "changed": "Answers changed", "tokens": "Length in tokens"}
    made: dict[str, str] = {}
    for measure, name in wanted.items():
        if measure not in measures:
            continue
        behaviours = dict.fromkeys(p.behaviour for p in sweep.points if p.measure == measure)
        together = [b for b in behaviours if b == OVER_COMPLIANCE]
        apart = [b for b in behaviours if b != OVER_COMPLIANCE]
        shown = [*together, *apart] if measure == "complied" or not together else together
        made[name] = _dose(sweep, measure, shown)
    return made


def _dose(sweep: SweepFigures, measure: str, behaviours: Sequence[str]) -> str:
    """One measure against alpha for several behaviour sets: the probe's neurons beside random."""
    columns = min(4, len(behaviours))
    rows = -(-len(behaviours) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(2.4 * columns, 2.3 * rows + 0.4), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharey=measure != "perplexity").flat
        for axes, behaviour in zip(panels, behaviours, strict=False):
            _dose_panel(axes, sweep, behaviour, measure)
        for axes in figure.axes[len(behaviours) :]:
            axes.set_axis_off()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=3)
        return _svg(figure, f"{measure} {behaviours}")


def _dose_panel(axes: Axes, sweep: SweepFigures, behaviour: str, measure: str) -> None:
    groups = [(control, CONTROL, 0.7, "") for control in sweep.controls]
    groups += [(RANDOM, CONTROL, 1.8, "random neurons: each set, mean")] if sweep.controls else []
    groups += [(PROBED, PROBE, 1.8, "the probe's H-Neurons")]
    for neurons, colour, width, label in groups:
        points = sorted(
            (p for p in sweep.points if (p.behaviour, p.measure, p.neurons)
             == (behaviour, measure, neurons)),
            key=lambda p: p.alpha,
        )  # fmt: skip
        alphas = [p.alpha for p in points]
        axes.plot(
            alphas, [p.value for p in points], "o-", ms=3, color=colour, lw=width, label=label
        )
        if neurons == PROBED:
            low, high = [p.low for p in points], [p.high for p in points]
            axes.fill_between(alphas, low, high, color=colour, alpha=0.2, linewidth=0)
    n = next(p.n for p in sweep.points if (p.behaviour, p.measure) == (behaviour, measure))
    name = "all sets" if behaviour == OVER_COMPLIANCE else behaviour.replace("_", " ")
    axes.set(xlabel="alpha", title=f"{name} (n = {n})", xticks=sweep.alphas)
    axes.axvline(1, color=CONTROL, linewidth=0.6, linestyle=":")


def _unit(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set(xlabel=x, ylabel=y, title=title, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


def standalone(picture: str) -> bytes:
    """A picture that is no part of a page: a file with colours of its own."""
    return picture.replace("<svg", '<svg style="color:#222;background:#fff"', 1).encode()


def _svg(figure: Figure, name: str) -> str:
    """The same bytes for the same figures; ids differ from picture to picture."""
    out = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = out.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
