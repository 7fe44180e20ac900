"""The report page: all of it from report.json, and nothing from anywhere else."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from offline import beside_run
from offline.crossvalidate import CrossValidation
from offline.curves import Curve
from offline.report import (
    Budget,
    Funnel,
    Neuron,
    PartCounts,
    Piece,
    Report,
    TintedAnswer,
)
from offline.report_charts import INK, shown_curves
from offline.report_page import _headline, render
from offline.sweep_figures import Example, Point, Slope, SweepFigures
from offline.transfer import Drift, Transfer
from probes.calibration import OperatingPoint
from probes.card import EvaluationRow, ModelIdentity, ReliabilityBin

CLAIMS = "claims, unseen relations and questions"
MOST_BYTES = 2 * 2**20


def _point(measure: str, behaviour: str, neurons: str, alpha: float) -> Point:
    return Point(
        behaviour=behaviour, measure=measure, neurons=neurons, alpha=alpha,
        value=0.5, low=0.4, high=0.6, n=12,
    )  # fmt: skip


@pytest.fixture
def sweep() -> SweepFigures:
    names = ("probe", "random-1", "random")
    return SweepFigures(
        probe="tiny@0123456789ab",
        model_id="tiny",
        suppressed=41,
        layers=2,
        controls=("random-1",),
        alphas=(0.0, 1.0, 3.0),
        settings={"max_tokens": "32"},
        points=tuple(
            _point(measure, behaviour, neurons, alpha)
            for measure, behaviour in (
                ("complied", "all"),
                ("complied", "refusal"),
                ("correct", "facts"),
                ("perplexity", "prose"),
            )
            for neurons in names
            for alpha in (0.0, 1.0, 3.0)
        ),
        slopes=tuple(
            Slope(
                behaviour="all", measure="complied", neurons=neurons,
                value=0.0617, low=-0.01, high=0.12, n=12,
            )
            for neurons in ("probe", "random-1", "random", "probe - random")
        ),
        examples=(
            Example(
                behaviour="refusal", asked="Do it.", neurons="probe", alpha=3.0,
                verdict="complied", text="<b>Sure</b>",
            ),
        ),
    )  # fmt: skip


@pytest.fixture
def report() -> Report:
    identity = ModelIdentity(
        model_id="tiny", revision="", config_digest="c", weights_fingerprint="w",
        tokenizer_sha256="t", chat_template_sha256="", dtype="float32",
        num_layers=2, intermediate_size=16, hidden_size=8, vocab_size=50,
    )  # fmt: skip
    row = EvaluationRow(
        dataset=CLAIMS, detector="probe", metric="auroc", value=0.8127, low=0.7, high=0.9, n=60
    )
    curve = Curve(
        dataset=CLAIMS, detector="probe", wrong=30, right=30,
        flagged_wrong=(0, 20, 30), flagged_right=(0, 4, 30),
    )  # fmt: skip
    rival = {"detector": "-logprob", "value": 0.6123}
    point = OperatingPoint(name="fpr_1", threshold=0.4831, false_positive_rate=0.01, recall=0.63)
    return Report(
        model=identity,
        position="read",
        facts={"judge": "alias match; 1 sample(s) agree"},
        funnel=(
            Funnel(
                source="facts", questions=80, answers=160,
                kept={"right": 70, "wrong": 71}, dropped={"declines to answer": 19},
            ),
        ),
        parts=(PartCounts(part="test", right=30, wrong=30, ordinary=5, tokens={"wrong": 77}),),
        neurons=(Neuron(layer=0, neuron=3, weight={"token": 1.5, "answer": -1.0}, found_in=1.0),
            Neuron(layer=1, neuron=9, weight={"token": -2.0, "answer": 0.5}, found_in=0.0),),
        budgets=(
            Budget(neurons=1, figures={"tokens": 0.7, "answers": 0.8}, chosen=False),
            Budget(neurons=2, figures={"tokens": 0.8, "answers": 0.9}, chosen=True),
        ),
        rows=(row, msgspec.structs.replace(row, **rival)),
        crossvalidation=None,
        curves=(curve, msgspec.structs.replace(curve, detector="-logprob")),
        reliability=(ReliabilityBin(level="token", mean_risk=0.2, frequency=0.25, n=40),),
        token_points=(point,),
        token_default="fpr_1",
        response_points=(point,),
        response_default="fpr_1",
        examples=(
            TintedAnswer(
                what="wrong", rank="highest", source="facts", prompt="Who?", accepted=("Ann",),
                risk=0.91,
                pieces=(
                    Piece(text="<i>Bob", risk=0.87, claim=True),
                    Piece(text="</i>.", risk=None, claim=False),
                ),
            ),
        ),
        not_good_for=("It is no fact checker.",),
        sweep=None,
        transfers=(),
    )  # fmt: skip


def test_the_page_is_one_small_file_that_asks_nobody_for_anything(
    report: Report, sweep: SweepFigures
) -> None:
    """A report is mailed and kept for years; a script or a font from elsewhere is gone by then."""
    page = render(msgspec.structs.replace(report, sweep=sweep))
    assert len(page.encode()) < MOST_BYTES
    without_names = re.sub(
        r'xmlns(?::xlink)?="[^"]*"|<metadata>.*?</metadata>', "", page, flags=re.S
    )
    assert not re.findall(r"<script|<link|@import|(?:src|href)=\"(?!#)", without_names)
    assert "https:" not in without_names


def test_every_figure_is_the_one_of_the_json(report: Report, tmp_path: Path) -> None:
    """What somebody corrects in report.json is corrected on the page, or the page lies."""
    report.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert "0.813" in render(Report.load(tmp_path / "report.json"))
    for old, new, shown in (
        ("0.8127", "0.7519", "0.752 [0.700, 0.900]"),
        ("0.4831", "0.5157", "0.5157"),
        ('"declines to answer":19', '"declines to answer":23', "23 declines to answer"),
        ('"questions":80', '"questions":84', "<td>84</td>"),
        ("0.87", "0.31", "risk 0.31"),
        ("It is no fact checker.", "It is a toy.", "It is a toy."),
    ):
        assert shown not in render(report)
        assert old in text
        (tmp_path / "report.json").write_text(text.replace(old, new))
        assert shown in render(Report.load(tmp_path / "report.json"))


def test_what_the_model_wrote_is_text_and_stays_text(report: Report, sweep: SweepFigures) -> None:
    """An answer is the one part of the page that nobody of us wrote."""
    page = render(msgspec.structs.replace(report, sweep=sweep))
    assert "&lt;i&gt;Bob" in page
    assert "&lt;b&gt;Sure" in page
    assert 'title="not scored"' in page


def test_the_figures_of_the_method_stand_apart_from_those_of_the_probe(report: Report) -> None:
    """Another probe's figures in the table of this one would flatter or slander it."""
    assert "crossvalidate</code> was not run for this fit" in render(report)
    row = EvaluationRow(
        dataset=CLAIMS, detector="probe", metric="auroc", value=0.7431, low=0.7, high=0.8, n=300
    )
    found = CrossValidation(fit_sha256="f", splits=7, neurons=(291, 297), rows=(row,))
    page = render(msgspec.structs.replace(report, crossvalidation=found))
    own, _, method = page.partition("With every relation unseen once")
    assert "0.743" not in own
    assert "7 probes were made like this one" in method
    assert "0.743 [0.700, 0.800]" in method


def test_without_a_sweep_the_page_says_so(report: Report, sweep: SweepFigures) -> None:
    assert "Not measured: no sweep was run" in render(report)
    page = render(msgspec.structs.replace(report, sweep=sweep))
    assert "no sweep was run" not in page
    assert "+0.062 [-0.010, +0.120]" in page
    assert "41 H-Neurons of probe <code>tiny@0123456789ab</code>" in page


def test_the_pictures_are_the_same_bytes_and_take_the_colour_of_the_page(report: Report) -> None:
    """Black axes on a dark page are no axes."""
    page = render(report)
    assert page == render(report)
    assert INK not in page
    assert "currentColor" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    shared = {id for id in ids if ids.count(id) > 1 and re.fullmatch(r"[mp][0-9a-f]{10}", id)}
    assert shared == set()


def test_a_curve_of_each_kind_of_detector_is_shown_once_and_the_probe_first(
    report: Report,
) -> None:
    """Four residual layers would push out what costs nothing."""
    row, curve = report.rows[0], report.curves[0]
    names = {"residual layer 10, dense": 0.9, "residual layer 20, dense": 0.95, "entropy": 0.6}
    report = msgspec.structs.replace(
        report,
        rows=(
            row,
            *(msgspec.structs.replace(row, detector=n, value=v) for n, v in names.items()),
        ),
        curves=(
            *(msgspec.structs.replace(curve, detector=name) for name in names),
            curve,
        ),
    )
    shown = [curve.detector for curve in shown_curves(report, CLAIMS)]
    assert shown == ["probe", "residual layer 20, dense", "entropy"]


def test_what_was_chosen_by_is_no_headline() -> None:
    """Folds of the fit part chose the probe: above the unseen rows they would pass for a test."""
    names = [
        "answers, folds of the fit part",
        CLAIMS,
        "answers, as asked",
        "pooling, short answers",
    ]
    assert _headline(names) == {CLAIMS, "answers, as asked"}


def test_a_cross_validation_of_another_fit_is_left_out_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its figures would pass for those of this method."""
    found = CrossValidation(fit_sha256="f", splits=2, neurons=(1, 2), rows=())
    assert beside_run.crossvalidation(tmp_path, "f") is None
    found.save(tmp_path / "crossvalidation.json")
    assert beside_run.crossvalidation(tmp_path, "f") == found
    assert beside_run.crossvalidation(tmp_path, "g") is None
    assert "is of another fit and left out" in caplog.text


def test_what_is_of_another_probe_is_left_out(
    sweep: SweepFigures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run folder is fitted again; its sweep and its siblings are of the probe before."""
    sweep.save(tmp_path / "sweep.json")
    found = Transfer(probe=sweep.probe, sibling="base", differs=(), rows=(), drift=None)
    (tmp_path / "transfer" / "base").mkdir(parents=True)
    (tmp_path / "transfer" / "base" / "transfer.json").write_bytes(msgspec.json.encode(found))
    for own in ("", sweep.probe):  # "": published elsewhere, nothing to compare with
        assert beside_run.sweep(tmp_path / "sweep.json", own) == sweep
        assert list(beside_run.transfers(tmp_path / "transfer", own)) == [found]
    assert not caplog.records
    assert beside_run.sweep(tmp_path / "sweep.json", "p@other") is None
    assert list(beside_run.transfers(tmp_path / "transfer", "p@other")) == []
    assert [record.message.split(" is of ")[1] for record in caplog.records] == [
        f"{sweep.probe} and left out; this run's probe is p@other"
    ] * 2


def test_siblings_are_shown_with_their_drift(report: Report) -> None:
    drift = Drift(neurons=3, mean=1e-3, mean_of_all=2e-3, rank=0.4, p_value=0.2)
    row = EvaluationRow(dataset="claims", detector="sibling", metric="auroc", value=0.71, n=9)
    found = Transfer(probe="p@1", sibling="the-base", differs=("dtype",), rows=(row,), drift=drift)
    page = render(msgspec.structs.replace(report, transfers=(found,)))
    for text in ("the-base (differs in dtype)", "0.710", "1.00e-03", "p = 0.200"):
        assert text in page
    assert "siblings" not in render(report)
