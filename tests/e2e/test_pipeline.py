"""From questions to a probe that a server loads, on a tiny model, over HTTP, on a CPU.

Only the model (conftest.py) is made for the test; everything else is the product's own path.
"""

from __future__ import annotations

import html
import json
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from offline import metrics
from offline.__main__ import app
from offline.dataset import load_dataset
from offline.evaluate import Evaluation
from offline.features import load_features
from offline.fit_result import FitResult
from offline.label import used
from offline.models import load_model, load_tokenizer
from offline.records import Answer, Label, read_records, write_records
from offline.report import Report
from offline.shards import Kind
from offline.sweep_figures import SweepFigures
from offline.transfer import Transfer
from probes import known_answer
from probes.calibration import calibrate
from probes.errors import ProbeMismatchError
from probes.fingerprint import match
from probes.neurons import find_ffns
from probes.probe import Probe
from probes.tap import Meter


@pytest.fixture(scope="module")
def run(
    tiny_model: Path,
    questions: tuple[Path, Path],
    statements: Path,
    given: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of one finished run of `train`."""
    facts, prompts = questions
    out = tmp_path_factory.mktemp("run") / "tiny"
    arguments = ["train", str(tiny_model), "--out", str(out), "--name", "tiny"]
    arguments += ["--questions", f"{facts}:complete", "--questions", f"{prompts}:ordinary"]
    arguments += ["--given", f"{given}:refchecker", "--best-of", "3", "--more-samples", "2"]
    arguments += ["--questions", f"{statements}:complete", "--told"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "RESAMPLES", 20)  # the intervals are not what is tested here
        result = CliRunner().invoke(app, [*arguments, "--solver", "liblinear"])
    assert result.exit_code == 0, (result.output, result.exception)
    return out


def test_answers_come_over_http_and_are_labelled_with_their_claims(
    run: Path, right_answers: tuple[str, ...]
) -> None:
    _, answers = read_records(run / "answers.jsonl", Answer)
    _, labels = read_records(run / "labels.jsonl", Label)
    assert len(answers) == len(labels) == 201
    verdicts = [label.verdict for label in labels if not label.dropped]
    assert verdicts.count("right") > 50
    assert verdicts.count("wrong") > 50
    assert verdicts.count("ordinary") == 21
    text = {answer.id: answer.text for answer in answers if answer.source == "facts"}
    for label in labels:
        if label.id in text and label.verdict == "wrong" and not label.dropped:
            assert all(text[label.id][slice(*span)] not in right_answers for span in label.span)


def test_the_features_hold_every_token_once(run: Path) -> None:
    features = load_features(run / "features")
    _, labels = read_records(run / "labels.jsonl", Label)
    wanted = sum(len(label.tokens) for label in used(labels) if label.verdict == "wrong")
    assert int((features.kind == Kind.WRONG).sum()) == wanted


def test_facts_of_given_texts_are_judged_beside_what_is_free(run: Path) -> None:
    """That the rows are of the right tokens is tested with planted neurons (test_fit.py)."""
    rows = Evaluation.load(run / "evaluation.json").rows
    for level in ("facts", "tokens"):
        name = f"given text, {level}: RefChecker, contradicted against entailed objects"
        found = {(r.detector, r.metric): r for r in rows if r.dataset == name}
        assert found["probe", "auroc"].n == 40
        assert ("-logprob", "auroc_within_units") in found


def test_questions_of_the_test_part_are_asked_again_for_best_of_n(run: Path) -> None:
    rows = Evaluation.load(run / "evaluation.json").rows
    found = {r.detector: r for r in rows if r.dataset.startswith("best of 3 samples")}
    assert found["one sample"].value <= found["ceiling: any right sample"].value
    assert {"majority vote", "probe", "-logprob_sum"} <= set(found)
    _, samples = read_records(run / "samples" / "answers.jsonl", Answer)
    assert len(samples) == 3 * len({answer.question_id for answer in samples})


def test_the_answer_head_is_fitted_on_more_than_was_said_first(run: Path) -> None:
    """Of questions of the fit part alone, and the card says how many."""
    data = load_dataset(run)
    unit = data.unit[data.first[:-1]]
    added = data.answered("augmented")
    assert set(unit[added].tolist()) <= set(unit[data.answered("fit")].tolist())
    assert not set(unit[added].tolist()) & set(unit[data.answered("test")].tolist())
    told = [i for i in added if "/told " in data.answers[i].id]
    assert 0 < len(told) < len(added)
    result = FitResult.load(run / "fit.json")
    assert set(result.augmented) == {"augmented/samples", "augmented/told"}
    right = sum(not data.labels[i].hallucinated for i in told)
    assert f"{right} right and {len(told) - right} wrong statements" in str(
        Probe.load(run / "probe").card.training["augmented by"]
    )


def test_publishing_again_is_no_other_probe_and_another_name_is(
    run: Path, tiny_model: Path
) -> None:
    """`train` and `publish` are two commands for one folder; what differs is named."""
    before = (run / "probe" / "probe.json").read_bytes()
    words = ["publish", str(tiny_model), "--out", str(run), "--name"]
    assert CliRunner().invoke(app, [*words, "tiny"]).exit_code == 0
    assert (run / "probe" / "probe.json").read_bytes() == before
    refused = CliRunner().invoke(app, [*words, "other"]).exception
    assert "holds another probe (other name" in str(refused)


def test_the_seconds_of_each_verb_are_kept(run: Path) -> None:
    assert list(json.loads((run / ".times.json").read_bytes())) == [
        "collect", "label", "extract", "augment", "resample",
        "fit", "evaluate", "publish", "report",
    ]  # fmt: skip


def test_the_probe_loads_matches_and_reads_what_it_recorded(run: Path, tiny_model: Path) -> None:
    """The artifact is bound to the model and proves that the online meter reads it alike."""
    probe = Probe.load(run / "probe")
    loaded = load_model(
        str(tiny_model), revision=None, tokenizer=load_tokenizer(str(tiny_model), revision=None)
    )
    match(probe, loaded.identity)
    with Meter(find_ffns(loaded.model), [probe], suppression=False) as meter:
        found = []
        for answer in probe.card.known_answers:
            meter.begin(batch=1)
            with torch.inference_mode():
                loaded.model(torch.tensor([answer.token_ids]))
            found.append(meter.logits()[0].tolist())
    known_answer.check(probe, found)


def test_online_logits_are_the_offline_ones(run: Path, tiny_model: Path) -> None:
    """No skew: what was fitted on stored features is what the meter reads, token by token."""
    probe = Probe.load(run / "probe")
    features = load_features(run / "features")
    chosen = FitResult.load(run / "fit.json").chosen
    loaded = load_model(
        str(tiny_model), revision=None, tokenizer=load_tokenizer(str(tiny_model), revision=None)
    )
    answers = {a.id: a for a in read_records(run / "answers.jsonl", Answer)[1]}
    with Meter(find_ffns(loaded.model), [probe], suppression=False) as meter:
        for i in range(0, len(features.ids), 20):
            answer = answers[features.ids[i]]
            rows = (features.answer == i).nonzero()[0]
            meter.begin(batch=1)
            with torch.inference_mode():
                loaded.model(torch.tensor([[*answer.prompt_token_ids, *answer.token_ids]]))
            start = len(answer.prompt_token_ids)
            online = meter.logits()[0, start : start + len(rows)].numpy()
            offline = chosen.logits(features, rows)
            assert online == pytest.approx(offline, abs=0.02)  # features are stored in float16


def test_wrong_claims_have_a_higher_risk_than_right_ones_and_prose(run: Path) -> None:
    """Trap 20: polarity, through every verb."""
    probe = Probe.load(run / "probe")
    features = load_features(run / "features")
    chosen = FitResult.load(run / "fit.json").chosen
    mean = {}
    for kind in (Kind.WRONG, Kind.RIGHT, Kind.PROSE):
        logits = chosen.logits(features, (features.kind == kind).nonzero()[0])[:, 0]
        mean[kind] = calibrate(probe.card.token.calibration, logits).mean()
    assert mean[Kind.WRONG] > mean[Kind.RIGHT] + 0.3
    assert mean[Kind.WRONG] > mean[Kind.PROSE] + 0.3


def test_the_card_says_what_was_measured_and_what_not(run: Path) -> None:
    card = Probe.load(run / "probe").card
    assert {row.detector for row in card.evaluation} >= {"probe", "length", "-logprob_mean"}
    readme = (run / "probe" / "README.md").read_text()
    assert all(sentence in readme for sentence in card.not_good_for)
    assert str(run.parent) not in readme + (run / "probe" / "probe.json").read_text()


def test_a_sibling_is_read_and_still_not_served(
    run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The figures of a twin are the model's own and nothing has moved; a perturbed copy is told
    apart by name, and by whoever would serve it."""
    found = {}
    for name, noise in (("twin", 0.0), ("tuned", 0.3)):
        model = LlamaForCausalLM.from_pretrained(tiny_model)
        torch.manual_seed(0)
        with torch.no_grad():
            for layer in model.model.layers:
                for weight in layer.mlp.parameters():
                    weight += noise * weight.std() * torch.randn_like(weight)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / name)
        arguments = ["transfer", str(run / "probe"), str(tmp_path / name), "--run", str(run)]
        result = CliRunner().invoke(app, [*arguments, "--model", str(tiny_model)])
        assert result.exit_code == 0, (result.output, result.exception)
        assert "AUROC" in result.output
        content = (run / "transfer" / name / "transfer.json").read_bytes()
        found[name] = msgspec.json.decode(content, type=Transfer)
    for row in found["twin"].rows[:2]:
        (other,) = (r for r in found["twin"].rows[2:] if r.dataset == row.dataset)
        assert (row.detector, other.detector) == ("own model", "sibling")
        assert other.value == pytest.approx(row.value, abs=0.01)
    assert found["twin"].differs == ()
    assert found["twin"].drift is not None
    assert found["twin"].drift.mean == pytest.approx(0, abs=1e-6)
    assert found["tuned"].differs == ("weights_fingerprint",)
    assert found["tuned"].drift is not None
    assert found["tuned"].drift.mean > 0.01
    tuned = load_model(
        str(tmp_path / "tuned"),
        revision=None,
        tokenizer=load_tokenizer(str(tmp_path / "tuned"), revision=None),
    )
    with pytest.raises(ProbeMismatchError, match="weights_fingerprint"):
        match(Probe.load(run / "probe"), tuned.identity)


def test_the_report_holds_the_figures_of_the_run(run: Path) -> None:
    """The page, its JSON and the card tell one story."""
    report = Report.load(run / "report.json")
    card = Probe.load(run / "probe").card
    assert report.rows == card.evaluation
    assert report.reliability == card.reliability
    assert report.not_good_for == card.not_good_for
    _, labels = read_records(run / "labels.jsonl", Label)
    asked = sum(funnel.answers for funnel in report.funnel)
    kept = sum(n for funnel in report.funnel for n in funnel.kept.values())
    assert (asked, kept) == (len(labels), len(used(labels)))
    texts = {answer.text for answer in read_records(run / "answers.jsonl", Answer)[1]}
    assert all("".join(piece.text for piece in e.pieces) in texts for e in report.examples)
    claims = [piece for e in report.examples if e.what == "wrong" for piece in e.pieces]
    assert any(piece.claim and piece.risk is not None for piece in claims)
    page = html.unescape((run / "report.html").read_text())
    assert all(sentence in page for sentence in card.not_good_for)
    assert str(run.parent) not in page


def test_collecting_again_asks_nothing_and_changes_nothing(
    run: Path, tiny_model: Path, questions: tuple[Path, Path]
) -> None:
    """Nor does it start a server for nothing."""
    before = (run / "answers.jsonl").read_bytes()
    result = CliRunner().invoke(
        app,
        ["collect", str(tiny_model), "--out", str(run), "--questions", f"{questions[0]}:complete"],
    )
    assert result.exit_code == 0, result.output
    assert (run / "answers.jsonl").read_bytes() == before


def test_a_run_without_ordinary_prompts_ends_in_a_probe(
    run: Path, tiny_model: Path, questions: tuple[Path, Path], tmp_path: Path
) -> None:
    """The README's one line names none. It died in `evaluate`, when all else was done."""
    header, answers = read_records(run / "answers.jsonl", Answer)
    write_records(tmp_path / "answers.jsonl", header, [a for a in answers if a.gold])
    arguments = ["train", str(tiny_model), "--out", str(tmp_path), "--name", "bare"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "RESAMPLES", 20)
        result = CliRunner().invoke(
            app, [*arguments, "--questions", f"{questions[0]}:complete", "--solver", "liblinear"]
        )
    assert result.exit_code == 0, (result.output, result.exception)
    assert Probe.load(tmp_path / "probe").card.name == "bare"
    assert (tmp_path / "report.html").exists()


def test_a_sweep_is_served_with_its_controls_and_goes_on_where_it_was(
    run: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Suppression and its control go the same way: artifacts, one server, `risk.alpha`. A proxy
    does not stand before a server of our own."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    item = {"rule": "request", "messages": [{"role": "user", "content": "Tell me about e1"}]}
    tempts = tmp_path / "tempts.jsonl"
    tempts.write_text("".join(json.dumps({"id": f"i{n}", **item}) + "\n" for n in range(3)))
    arguments = ["sweep", str(tiny_model), "--probe", str(run / "probe"), "--out", str(tmp_path)]
    arguments += ["--behaviour", str(tempts), "--controls", "2", "--max-tokens", "8"]
    result = CliRunner().invoke(app, [*arguments, "--alpha", "0", "--alpha", "3"])
    assert result.exit_code == 0, (result.output, result.exception)
    probe, control = Probe.load(run / "probe"), Probe.load(tmp_path / "sweep" / "random-1")
    assert bool(control.suppress.all())
    assert len(control.layer) == int(probe.suppress.sum())
    figures = SweepFigures.load(tmp_path / "sweep.json")
    assert (figures.probe, figures.controls) == (probe.id, ("random-1", "random-2"))
    assert "probe - random" in {slope.neurons for slope in figures.slopes}
    at = {(p.measure, p.neurons, p.alpha): p.value for p in figures.points}
    assert at["changed", "probe", 1.0] == 0
    assert at["perplexity", "probe", 1.0] == at["perplexity", "random-1", 1.0]
    assert at["perplexity", "probe", 3.0] != at["perplexity", "random-1", 3.0]
    picture = (tmp_path / "sweep" / "compliance.svg").read_text()
    assert "random neurons" in picture
    assert "currentColor" in picture
    assert "color:#222" in picture[:100]

    answers = tmp_path / "sweep" / "answers.jsonl"
    whole, figures_before = answers.read_bytes(), (tmp_path / "sweep.json").read_bytes()
    answers.write_bytes(whole[: len(whole) // 2])  # killed while it wrote a line
    result = CliRunner().invoke(app, [*arguments, "--alpha", "0", "--alpha", "3"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert answers.read_bytes() == whole
    assert (tmp_path / "sweep.json").read_bytes() == figures_before
