"""The fit finds what was planted, folds its scaler, and never touches what judges it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

from offline import baselines, metrics
from offline.baselines import RANDOM, RANDOM_DRAWS, random_neurons, token_detectors
from offline.best_of import best_of_rows, load_samples
from offline.dataset import Dataset, join
from offline.domains import NEVER_TRAINED_ON
from offline.evaluate import Evaluation, evaluate
from offline.examples import (
    Examples,
    answer_examples,
    answer_means,
    claim_examples,
    token_examples,
)
from offline.features import load_features
from offline.fit import _fold_of_units, choose, fit, make_examples, train_design
from offline.fit_result import TOKEN, FitResult, FitSettings, Trial, fit_settings
from offline.given_rows import Given, given_rows
from offline.given_text import Fact, GivenText
from offline.heads import LOGIT_SPREAD, HeadSettings, find_columns, weigh
from offline.l1_path import l1_path, standardise
from offline.mixtures import pooled
from offline.publish import _chosen, publish
from offline.records import Answer, Label, RecordError
from offline.report import make_report
from offline.response_rows import _worst_spans
from offline.shards import SHARD_KEY, WHOLE, FeaturesHeader, Kind, ShardInfo
from offline.splits import Split, folds
from offline.stability import found_again
from probes.calibration import Platt, calibrate
from probes.card import ModelIdentity
from probes.cett import FORMULA_VERSION

MakeAnswer = Callable[..., Answer]

LAYERS, WIDTH = 4, 30
PLANTED = (7, 40, 41, 100)
SETTINGS = FitSettings(
    seed=0, heads=HeadSettings(solver="liblinear"), max_neurons=40, folds=3, window=8
)
QUICK = HeadSettings(solver="liblinear", strengths=(0.05,), penalties=(0.03,))


def test_a_folded_probe_reads_raw_features_as_the_fit_reads_scaled_ones(data: Dataset) -> None:
    """Trap 15: the reference fits raw features and ships weights that fit nothing else."""
    examples = token_examples(data, SETTINGS)
    every = np.ones(len(examples.unit), dtype=bool)
    columns = np.array([*PLANTED, 90])
    (weights,) = weigh(examples, every, "token", np.sort(columns), (0.03,))
    rows, positive = examples.taken(every)
    x = examples.x[rows][:, np.sort(columns)].astype(np.float32)
    raw = weights.read(x)[:, 0]
    standardise(x)
    scaled = LogisticRegression(C=1 / (0.03 * len(x)), max_iter=500).fit(x, positive)
    assert raw == pytest.approx(scaled.decision_function(x), abs=2e-3)


def test_the_logits_of_every_head_have_one_spread_over_tokens(data: Dataset) -> None:
    """Means of many tokens spread less than tokens: scaled by them, the answer head's logits of
    single tokens would leave the known-answer test's tolerance."""
    examples = make_examples(data, SETTINGS)
    kept = {head: np.ones(len(one.unit), dtype=bool) for head, one in examples.items()}
    for draft in train_design(examples, kept, [20], SETTINGS)[0]:
        values = examples["token"].x[:, np.array(draft.columns)].astype(np.float32)
        assert draft.read(values).std(axis=0) == pytest.approx([LOGIT_SPREAD] * 2, rel=1e-6)


def test_a_constant_neuron_gets_no_weight_and_breaks_nothing() -> None:
    x = np.asfortranarray(np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32))
    x[:, 1] = 0.25
    standardise(x)
    assert np.isfinite(x).all()
    *_, (_, weight, _) = l1_path(x, x[:, 0] > 0, (0.5, 0.1), solver="liblinear")
    assert weight[0] > 0
    assert weight[1] == 0


@pytest.fixture
def data(tmp_path: Path, make_answer: MakeAnswer) -> Dataset:
    return _dataset(tmp_path, make_answer)


def test_the_probe_holds_the_planted_neurons_and_ranks_wrong_above_right(data: Dataset) -> None:
    """Trap 20: a worse answer has a higher risk, on units that nothing was fitted on."""
    result = fit(data, SETTINGS)
    assert set(PLANTED) <= set(result.chosen.columns)
    assert len(result.chosen.columns) <= SETTINGS.max_neurons
    answered = data.answered("test")
    wrong = data.hallucinated(answered)
    logits = result.chosen.logits(data.features, np.arange(len(data.part)))
    score = pooled(data, logits[:, result.response_head], answered, result.pooling)
    assert metrics.rank(wrong, score) > 0.9
    risk = calibrate(result.response, score)
    assert risk[wrong].mean() > risk[~wrong].mean() + 0.2


def test_what_is_planted_is_found_in_every_half_and_noise_is_not(data: Dataset) -> None:
    """Which neurons are found again is all that one can say of their identity."""
    weak = HeadSettings(solver="liblinear", strengths=(0.02,), penalties=(0.03,))
    result = fit(data, msgspec.structs.replace(SETTINGS, heads=weak, budgets=(1.0,)))
    again = dict(zip(result.chosen.columns, result.found_in, strict=True))
    assert all(again[column] == 1 for column in PLANTED)
    noise = [share for column, share in again.items() if column not in PLANTED]
    assert 0 <= min(noise) < 0.6


def test_a_neuron_that_tells_in_one_relation_alone_is_not_stable() -> None:
    """A fit on everything names it; half of the halves have never seen that relation."""
    random = np.random.default_rng(0)
    unit = np.repeat(["big", *(f"r{i}" for i in range(13))], [140, *[20] * 13])
    x = random.standard_normal((400, 200)).astype(np.float16)
    positive = x[:, 0] - x[:, 1] + 0.3 * random.standard_normal(400) > 0
    odd = unit == "big"
    x[odd, 2] += np.where(positive[odd], 3.0, -3.0)
    examples = {"token": Examples(x, positive, np.ones(400, dtype=np.int64), unit)}
    every = {"token": np.ones(400, dtype=np.bool_)}
    heads = HeadSettings(solver="liblinear", strengths=(0.4, 0.2))
    settings = FitSettings(heads=heads, resamples=12, seed=1)
    (columns,) = find_columns(examples, every, [5], heads)
    assert columns.tolist() == [0, 1, 2]
    assert found_again(examples, (0, 1, 2), 5, settings)[:2] == (1, 1)
    assert 0.2 < found_again(examples, (0, 1, 2), 5, settings)[2] < 0.8


def test_halves_of_one_class_are_drawn_again_and_too_many_tell_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    random = np.random.default_rng(0)
    x, positive = random.standard_normal((80, 20)).astype(np.float16), np.arange(80) % 2 == 0
    x[:, 0] += 3 * positive
    heads = HeadSettings(solver="liblinear", strengths=(0.2,))
    settings = FitSettings(heads=heads, resamples=8)
    one, two = (
        {"token": Examples(x, positive, np.ones(80, dtype=np.int64), unit)}
        for unit in (np.where(positive, "a", "b"), np.array(list("aabbccdd") * 10))
    )
    assert found_again(one, (0,), 5, settings) == ()
    assert "only 0 of 16 halves of the 2 relations" in caplog.text
    assert found_again(two, (0,), 5, settings) == (1.0,)


def test_given_facts_are_ranked_by_their_own_tokens(data: Dataset) -> None:
    """Answers of the data as texts of somebody: the last of five tokens is a fact, and planted
    neurons tell; log-probability, which is noise here, does not."""
    texts = {
        id: GivenText(
            id=id, kind="planted", prompt_token_ids=(), token_ids=(),
            facts=() if label.verdict == "ordinary"
            else (Fact(tokens=(3, 4), wrong=label.hallucinated),),
        )
        for id, label in zip(data.features.ids, data.labels, strict=True)
    }  # fmt: skip
    kind = data.features.kind.copy()
    kind[np.flatnonzero(np.isin(kind, (Kind.RIGHT, Kind.WRONG))) - 1] = Kind.RIGHT
    given = Given(texts, dataclasses.replace(data.features, kind=kind))
    detectors = token_detectors(data, fit(data, SETTINGS))
    rows = given_rows(given, detectors)
    found = {(r.dataset, r.detector): r.value for r in rows if r.metric == "auroc"}
    assert found["given text, facts: planted", "probe"] > 0.95
    assert 0.6 < found["given text, tokens: planted", "probe"] < 0.9  # half of them are scaffold
    assert 0.35 < found["given text, facts: planted", "-logprob"] < 0.65


def test_best_of_n_answers_with_the_sample_of_the_lowest_risk(data: Dataset) -> None:
    """Six samples of each question, all of one text, every other one wrong, the first one too."""
    answers = tuple(
        msgspec.structs.replace(answer, id=answer.id[:-2].replace("-", "/")) if answer.gold
        else answer
        for answer in data.answers
    )  # fmt: skip
    rows = list(best_of_rows(dataclasses.replace(data, answers=answers), fit(data, SETTINGS)))
    found = {row.detector: row.value for row in rows}
    assert {row.n for row in rows} == {40}
    assert found["probe"] > 0.9
    assert found["one sample"] == found["majority vote"] == 0
    assert found["ceiling: any right sample"] == 1
    assert 0.2 < found["-logprob_mean"] < 0.8


def test_nothing_of_the_test_part_reaches_the_result(
    data: Dataset, tmp_path: Path, make_answer: MakeAnswer
) -> None:
    """Other kinds, verdicts and numbers of every test row change nothing: no leak from what judges
    the probe, be it through a scaler or the choice of columns."""
    tested = data.part == "test"
    turned = {"right": "wrong", "wrong": "right", "ordinary": "ordinary"}
    labels = tuple(
        _label(label.id, turned[label.verdict]) if tested[first] else label
        for label, first in zip(data.labels, data.first[:-1], strict=True)
    )
    other = _dataset(tmp_path / "other", make_answer, noise=np.flatnonzero(tested))
    kind = np.where(tested, Kind.UNJUDGED, data.features.kind)
    assert np.array_equal(other.part, data.part)
    assert other.features.cett(np.flatnonzero(tested)).mean() > 5
    broken = dataclasses.replace(with_kinds(other, kind), labels=labels)
    assert fit(broken, SETTINGS) == fit(data, SETTINGS)


def test_risks_are_calibrated_by_probes_that_did_not_see_the_rows(data: Dataset) -> None:
    """On noise alone, logits of the rows that were fitted on would look like knowledge."""
    random = np.random.default_rng(0)
    kind = data.features.kind.copy()
    labels = list(data.labels)
    for i, label in enumerate(labels):
        if label.verdict != "ordinary":
            wrong = bool(random.random() < 0.5)
            kind[data.claim_rows(i)] = Kind.WRONG if wrong else Kind.RIGHT
            labels[i] = _label(label.id, "wrong" if wrong else "right")
    noise = dataclasses.replace(with_kinds(data, kind), labels=tuple(labels))
    result = fit(noise, SETTINGS)
    assert max(trial.figures["claims"] for trial in result.trials) < 0.65
    rows = noise.even_rows("fit", Kind.WRONG, Kind.RIGHT)
    risk = calibrate(result.token, result.chosen.logits(noise.features, rows)[:, 0])
    assert risk[noise.features.kind[rows] == Kind.WRONG].mean() < 0.75


def test_the_papers_design_chooses_nothing_and_refuses_what_it_does_not_know(data: Dataset) -> None:
    """Its card would else tell of a budget, a choice and a penalty that nobody used."""
    result = fit(data, fit_settings("1-vs-1", seed=0, c=300.0))
    assert len(result.trials) == 1
    assert result.penalty == {TOKEN: 0}
    assert re.match(
        r"nothing: \d+ neurons are what L1 on raw CETT at C = 300 leaves", _chosen(result)
    )
    for given, message in (
        ({"design": "3-vs-1", "max_neurons": 50}, "--max-neurons is not of --design 3-vs-1"),
        ({"design": "1-vs-1", "solver": "skglm"}, "--solver is not of --design 1-vs-1"),
        ({"design": "tokens", "c": 1.0}, "--c is of the paper's designs"),
    ):
        with pytest.raises(RecordError, match=message):
            fit_settings(seed=0, **given)  # type: ignore[arg-type]


def test_each_head_sees_its_own_examples_and_right_claims_weigh_what_the_settings_say(
    data: Dataset,
) -> None:
    settings = msgspec.structs.replace(SETTINGS, right_per_wrong=3.0, windows_per_wrong=0.2)
    tokens, answers = token_examples(data, settings), answer_examples(data, settings)
    wrong = int(tokens.positive.sum())
    assert wrong == len(data.rows("fit", Kind.WRONG))
    assert int(tokens.weight[tokens.weight > 1].sum()) / wrong == pytest.approx(3.0, abs=0.6)
    answered = data.answered("fit")
    assert len(answers.unit) == len(answered) + round(0.2 * answers.positive.sum())
    mean = data.features.cett(data.rows_of(int(answered[0]))).mean(axis=0)
    assert answers.x[0].astype(np.float32) == pytest.approx(mean, rel=2e-3)


def test_a_neuron_that_one_head_finds_is_read_by_both(data: Dataset) -> None:
    examples = make_examples(data, SETTINGS)
    kept = {head: np.ones(len(one.unit), dtype=bool) for head, one in examples.items()}
    ((first, *_),) = train_design(examples, kept, [20], SETTINGS)
    assert first.heads == ("token", "answer")
    assert len(first.columns) <= 20
    assert (np.array(first.weight) != 0).all()
    assert first.head(1).heads == ("answer",)


@pytest.mark.parametrize(("design", "around"), [("1-vs-1", False), ("3-vs-1", True)])
def test_the_papers_designs_are_one_setting_away(data: Dataset, design: str, around: bool) -> None:
    """Means over claims, CETT as it is, liblinear at C: nothing standardised, nothing chosen."""
    settings = msgspec.structs.replace(SETTINGS, design=design, c=1000.0)
    examples = claim_examples(data, around=around)
    claims = len(data.answered("fit"))
    assert len(examples.unit) == (2 * claims if around else claims)
    assert int(examples.positive.sum()) == int(data.hallucinated(data.answered("fit")).sum())
    result = fit(data, settings)
    assert result.chosen.heads == ("token",)
    reference = LogisticRegression(
        l1_ratio=1.0, C=1000.0, solver="liblinear", max_iter=1000, random_state=0
    ).fit(examples.x.astype(np.float32), examples.positive)
    assert result.chosen.columns == tuple(np.flatnonzero(reference.coef_[0]).tolist())


def test_one_class_alone_is_refused(data: Dataset) -> None:
    kind = data.features.kind.copy()
    kind[kind == Kind.RIGHT] = Kind.UNJUDGED
    with pytest.raises(RecordError, match="0 of right ones"):
        fit(with_kinds(data, kind), SETTINGS)


def test_the_sparsest_within_one_standard_error_of_the_best_is_chosen() -> None:
    """Folds differ more than budgets do: the error is that of the difference, fold by fold."""
    trials = [
        Trial(neurons=neurons, penalty={}, figures={}, folds=folds)
        for neurons, folds in (
            (50, (0.70, 0.80, 0.90)),  # always .05 below: worse
            (100, (0.74, 0.86, 0.94)),  # .003 below on average, once above
            (300, (0.75, 0.85, 0.95)),
        )
    ]
    assert choose(trials) == 1
    assert choose(trials[::2]) == 1


def test_a_fold_of_one_class_judges_no_budget_and_the_result_comes_back(
    data: Dataset, tmp_path: Path
) -> None:
    """Its AUROC is nan: the first penalty would be the best, and fit.json could not be read."""
    settings = msgspec.structs.replace(SETTINGS, heads=QUICK)
    result = fit(_without_right(data, folds=1), settings)
    assert {len(trial.folds) for trial in result.trials} == {2}
    assert np.isfinite([value for t in result.trials for value in t.figures.values()]).all()
    result.save(tmp_path / "fit.json")
    assert FitResult.load(tmp_path / "fit.json") == result


def test_folds_that_cannot_judge_are_refused_before_anything_is_fitted(data: Dataset) -> None:
    with pytest.raises(RecordError, match=r"1 of the folds .* ask more"):
        fit(_without_right(data, folds=2), SETTINGS)


def test_a_method_without_a_score_leaves_a_file_that_can_be_read(tmp_path: Path) -> None:
    """JSON makes null of an infinite score; the reader then ended in a traceback."""
    (tmp_path / "fit.json").write_text('{"calibrations": {"token": {"platt": null}}}')
    with pytest.raises(RecordError, match=r"fit\.json.*run the verb that writes it again"):
        FitResult.load(tmp_path / "fit.json")


def test_settings_and_result_come_back_from_their_file(data: Dataset, tmp_path: Path) -> None:
    """Trap 11: two of the reference's flags could not be switched off."""
    settings = FitSettings(seed=3, heads=HeadSettings(solver="liblinear"), max_neurons=17)
    result = msgspec.structs.replace(fit(data, SETTINGS), settings=settings)
    result.save(tmp_path / "fit.json")
    assert FitResult.load(tmp_path / "fit.json") == result


def test_the_evaluation_has_every_baseline_on_the_same_items_with_intervals(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim without length, question words, log-probability and a dense rival does not ship."""
    monkeypatch.setattr(metrics, "RESAMPLES", 40)
    result = fit(data, SETTINGS)
    table = evaluate(data, result)
    answers = {
        row.detector: row
        for row in table.rows
        if row.metric == "auroc"
        and row.dataset == "answers, unseen relations and questions, as asked"
    }
    assert {
        "probe", "-logprob_mean", "-logprob_min", "-logprob_sum", "entropy_mean", "entropy_max",
        "length", "words of the question", "words of question and answer", RANDOM,
        "residual layer 2, dense", "CETT of all neurons, dense", "fitted on wiki alone",
        "probe and log-probability, standardised sum",
    } <= set(answers)  # fmt: skip
    assert len({row.n for row in answers.values()}) == 1
    probe = answers["probe"]
    assert probe.low is not None
    assert probe.high is not None
    assert probe.low <= probe.value <= probe.high
    assert probe.value > 0.9
    assert answers["length"].value < 0.8
    assert answers["CETT of all neurons, dense"].value > 0.8
    assert {row.metric for row in table.rows} >= {
        "auprc", "ece", "brier", "recall_at_5_fpr", "accuracy_at_coverage_0.5",
    }  # fmt: skip
    area = {(row.dataset, row.detector): row for row in table.rows if row.metric == "auroc"}
    gained = [row for row in table.rows if row.metric == "auroc_gained"]
    of_answers, of_claims, of_tokens = (
        {row.detector for row in gained if row.dataset == f"probe less rival, {name}"}
        for name in (
            "answers, unseen relations and questions, as asked",
            "claims, unseen relations and questions",
            "tokens, wrong claims against all others",
        )
    )
    assert {"length", "-logprob_sum", "residual layer 2, dense"} <= of_answers
    assert {"-logprob", "entropy"} == of_claims
    assert {"-logprob", "place in the text, first is highest"} <= of_tokens
    assert not {"probe", RANDOM} & {row.detector for row in gained}
    for row in gained:
        dataset = row.dataset.removeprefix("probe less rival, ")
        lead = area[dataset, "probe"].value - area[dataset, row.detector].value
        assert row.value == pytest.approx(lead)
    risks = {
        (row.dataset, row.metric)
        for row in table.rows
        if row.dataset.endswith("responses, unseen relations and questions, as asked")
        or row.dataset == "response risk, unseen relations and questions, as asked"
    }
    assert (
        "response risk, unseen relations and questions, as asked",
        "accuracy_at_fpr_10",
    ) in risks
    assert (
        "right responses, unseen relations and questions, as asked",
        "flagged_at_fpr_1",
    ) in risks
    poolings = {row.detector for row in table.rows if row.dataset == "pooling, short answers"}
    assert {"token head, mean 1", "token head, worst flagged span"} <= poolings
    tokens = {row.detector for row in table.rows if row.dataset.startswith("tokens, wrong claims")}
    assert tokens >= {"probe", "probe, mean of 3 neighbours", "-logprob", RANDOM}
    assert {found.level for found in table.reliability} == {"token", "span", "response"}


def test_claims_of_short_answers_are_told_from_prose_by_their_place_alone(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of what looks like a token monitor is that short answers end where long ones go on; a
    report without that row lets the probe take the credit."""
    monkeypatch.setattr(metrics, "RESAMPLES", 2)
    rows = evaluate(data, fit(data, SETTINGS)).rows
    found = {
        r.dataset: r.value for r in rows if r.metric == "auroc" and r.detector.startswith("place")
    }
    # The claim is token 4 of a short answer; of 40 tokens of prose 35 come later, 4 earlier.
    assert found["tokens, wrong claims against ordinary long answers"] == pytest.approx(35.5 / 40)
    assert found["tokens, wrong against right claims"] == 0.5


def test_samples_of_what_was_fitted_on_are_refused(
    data: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The rows "best of n" are of unseen questions."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "labels.jsonl").touch()
    at = {part: int(np.flatnonzero(data.part == part)[0]) for part in ("fit", "test")}
    monkeypatch.setattr(
        "offline.best_of.read_labelled", lambda run: SimpleNamespace(answers=data.answers)
    )
    for part, row in at.items():
        sample = dataclasses.replace(data, answers=(data.answers[data.features.answer[row]],))
        monkeypatch.setattr(
            "offline.best_of.load_dataset", lambda folder, split, found=sample: found
        )
        if part == "test":
            assert load_samples(tmp_path, data) is sample
        else:
            with pytest.raises(RecordError, match="not of the test part; delete the folder"):
                load_samples(tmp_path, data)


def test_examples_are_as_exact_as_the_features(data: Dataset) -> None:
    """`--dtype float32` was rounded to half of it on the way to the fit."""
    means = {}
    for dtype in ("float16", "bfloat16", "float32"):
        header = msgspec.structs.replace(data.features.header, dtype=dtype)
        features = dataclasses.replace(data.features, header=header)
        means[dtype] = answer_means(
            dataclasses.replace(data, features=features), np.arange(3)
        ).dtype
    assert means == {"float16": np.float16, "bfloat16": np.float32, "float32": np.float32}


def test_an_answer_without_a_flagged_span_ranks_below_all_others(data: Dataset) -> None:
    """And of several spans the worst one counts, by the mean of the head that is asked."""
    result = fit(data, msgspec.structs.replace(SETTINGS, heads=QUICK))
    threshold = next(p.threshold for p in result.token_points if p.name == "fpr_1")
    steep = Platt(slope=1.0, intercept=float(np.log(threshold / (1 - threshold))))  # flags at >= 0
    result = msgspec.structs.replace(result, token=steep)
    logits = np.full((len(data.part), 2), -1.0)
    one, two = data.rows_of(1), data.rows_of(2)  # and none of answer 0
    logits[one[1:3]] = [[0.5, 3.0], [1.5, 5.0]]
    logits[two[[0, 3]]] = [[2.0, 1.0], [0.1, 6.0]]
    ranks = [_worst_spans(data, result, logits, head, np.arange(3)) for head in (0, 1)]
    assert ranks[0].tolist() == [0.0, 1.0, 2.0]
    assert ranks[1].tolist() == [3.0, 4.0, 6.0]


def test_domains_that_nothing_was_fitted_on_have_rows_of_tokens_and_responses(
    tmp_path: Path, make_answer: MakeAnswer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds and risks unchanged: what these are worth elsewhere was nowhere to be seen."""
    monkeypatch.setattr(metrics, "RESAMPLES", 2)
    monkeypatch.setattr("offline.domains.MIN_CLASS", 1)
    data = _dataset(tmp_path, make_answer)
    home = data.part.copy().astype("U8")
    moved = [i for i, answer in enumerate(data.answers) if answer.gold and i % 3 == 0]
    for i in moved:
        home[data.rows_of(i)] = "transfer"
    data = dataclasses.replace(data, part=home)
    table = evaluate(data, fit(data, msgspec.structs.replace(SETTINGS, heads=QUICK)))
    datasets = {row.dataset for row in table.rows}
    for start in ("token risk, ", "tokens of wrong claims, ", "tokens, wrong claims against all"):
        assert any(d.startswith(start) and NEVER_TRAINED_ON in d for d in datasets), start
    (judged,) = {row.n for row in table.rows if row.dataset == f"token risk, {NEVER_TRAINED_ON}"}
    kinds = (Kind.WRONG, Kind.RIGHT, Kind.SCAFFOLD)
    here, at_home = (len(data.even_rows(part, *kinds)) for part in ("transfer", "test"))
    assert judged == here != at_home
    for start in ("response risk, ", "right responses, ", "wrong responses, "):
        assert any(d.startswith(start) and NEVER_TRAINED_ON in d for d in datasets), start


def test_a_data_set_that_lacks_a_class_has_no_rows_and_the_log_says_so(
    tmp_path: Path,
    make_answer: MakeAnswer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without ordinary prompts `train` died in its sixth verb, hours after it had begun."""
    monkeypatch.setattr(metrics, "RESAMPLES", 2)
    data = _dataset(tmp_path, make_answer, ordinary=0)
    table = evaluate(data, fit(data, msgspec.structs.replace(SETTINGS, heads=QUICK)))
    lacking = "tokens, wrong claims against ordinary long answers"
    assert lacking in caplog.text
    assert lacking not in {row.dataset for row in table.rows}
    assert "tokens, wrong against right claims" in {row.dataset for row in table.rows}
    assert np.isfinite([row.value for row in table.rows]).all()
    table.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == table


def test_a_test_part_of_one_class_has_no_ranking(
    data: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A small run may have no right answer there; what can be said is said."""
    monkeypatch.setattr(metrics, "RESAMPLES", 2)
    result = fit(data, msgspec.structs.replace(SETTINGS, heads=QUICK))
    table = evaluate(_all_wrong(data, data.answered("test")), result)
    for dataset in ("tokens", "claims", "pooling, short answers", "whole answers"):
        assert f"no figures of {dataset}" in caplog.text.replace("'", "")
    assert np.isfinite([row.value for row in table.rows]).all()
    assert "tokens of wrong claims" in {row.dataset for row in table.rows}


def test_files_that_do_not_belong_together_are_refused(data: Dataset, tmp_path: Path) -> None:
    """After a second `fit` a probe was published with the figures of the first."""
    result = fit(data, msgspec.structs.replace(SETTINGS, heads=QUICK))
    table = Evaluation(fit_sha256=result.sha256, rows=(), reliability=(), curves=())
    table.check(result)
    again = msgspec.structs.replace(result, penalty={"token": 1.0, "answer": 1.0})
    with pytest.raises(RecordError, match=r"another fit than fit\.json; `evaluate` again"):
        table.check(again)
    with pytest.raises(RecordError, match="another fit"):
        make_report(tmp_path, again, table, data, None)  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="another fit"):
        publish(
            tmp_path / "probe", name="p", result=again, evaluation=table, data=data,
            loaded=SimpleNamespace(identity=again.features.model), training={},  # type: ignore[arg-type]
        )  # fmt: skip
    other = msgspec.structs.replace(result.features, labels_sha256="of other labels")
    stale = msgspec.structs.replace(result, features=other)
    with pytest.raises(RecordError, match="other features than there are; `fit` again"):
        evaluate(data, stale)
    more = dataclasses.replace(data, augmented={"augmented/told": "digest"})
    with pytest.raises(RecordError, match="augmented by nothing, and the run holds augmented/told"):
        evaluate(more, result)


def test_a_baseline_chooses_its_penalty_where_both_classes_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fold of one class ranks nothing: its NaN would have chosen the first penalty there is."""
    seen: list[float] = []
    monkeypatch.setattr(
        baselines, "rank", lambda *given: seen.append(metrics.rank(*given)) or seen[-1]
    )
    units = [f"u{i}" for i in range(40)]
    random = np.random.default_rng(0)
    wrong = np.array(folds(units, 4, seed=0)) > 1
    wrong[::2] = False  # folds 0 and 1 have none
    x = (random.standard_normal((40, 5)) + 2 * wrong[:, None]).astype(np.float32)
    model = baselines._dense(x.copy(), wrong, units)
    assert len(seen) == len(baselines.PENALTIES)
    assert np.isfinite(seen).all()
    assert metrics.rank(wrong, model.read(x)) > 0.9
    one = np.arange(40) == 39  # no fold can rank
    assert np.isfinite(baselines._dense(x.copy(), one, units).weight).all()
    assert len(seen) == len(baselines.PENALTIES)


def test_a_baseline_sees_the_same_rows_as_the_probe(data: Dataset) -> None:
    result = fit(data, SETTINGS)
    rows = data.rows("test", Kind.WRONG, Kind.RIGHT)
    detectors = token_detectors(data, result)
    scores = {name: read(data.features, rows) for name, read in detectors.items()}
    assert all(len(score) == len(rows) and np.isfinite(score).all() for score in scores.values())
    assert scores["-logprob"] == pytest.approx(-data.features.logprob[rows])
    assert random_neurons(data, result, rows).shape == (RANDOM_DRAWS, len(rows))


def test_answers_without_rows_count_among_the_groups_of_their_source(
    data: Dataset, make_answer: MakeAnswer
) -> None:
    """`label` keeps what was asked where a probe is judged, by its own split: the later verbs must
    split alike."""
    seen = [msgspec.structs.replace(a, group=f"r{i % 6}") for i, a in enumerate(data.answers)]
    unused = [
        make_answer(
            question=f"Unused {i}", id=f"wiki/complete/u{i}/0", group=f"u{i}", source="wiki"
        )
        for i in range(4)
    ]
    joined = join(data.features, [*seen, *unused], data.labels, Split(seed=0))
    assert {unit for unit in joined.unit if unit.startswith("wiki")} == {
        f"wiki/r{i}" for i in range(6)
    }


def _all_wrong(data: Dataset, answers: Sequence[int] | np.ndarray) -> Dataset:
    """`data` with other verdicts: `answers` are wrong."""
    kind, labels = data.features.kind.copy(), list(data.labels)
    for i in answers:
        kind[data.claim_rows(i)] = Kind.WRONG
        labels[i] = _label(labels[i].id, "wrong")
    return dataclasses.replace(with_kinds(data, kind), labels=tuple(labels))


def _without_right(data: Dataset, *, folds: int) -> Dataset:
    """`data` in which so many of its folds have no right answer."""
    home = _fold_of_units(data, SETTINGS)
    answers = data.answered("fit")
    fold = np.array([home[unit] for unit in data.unit[data.first[answers]]])
    return _all_wrong(data, answers[fold < folds])


def with_kinds(data: Dataset, kind: np.ndarray) -> Dataset:
    """`data` with other kinds of tokens."""
    return dataclasses.replace(data, features=dataclasses.replace(data.features, kind=kind))


def _dataset(
    folder: Path,
    make_answer: MakeAnswer,
    *,
    ordinary: int = 9,
    noise: Sequence[int] | np.ndarray = (),
) -> Dataset:
    """40 relations of 6 answers of 5 tokens, the last of them the claim; and ordinary answers.

    Planted neurons fire on the claims of wrong answers only; rows of `noise` hold other numbers.
    """
    random = np.random.default_rng(0)
    answers: list[Answer] = []
    labels: list[Label] = []
    kinds: list[list[Kind]] = []
    for g in range(40):
        for i in range(6):
            wrong = i % 2 == 0
            id = f"wiki/complete/q{g}-{i}/0"
            answers.append(
                make_answer(question=f"The r{g} of x{i} is", id=id, group=f"r{g}", source="wiki")
            )
            verdict = "wrong" if wrong else "right"
            labels.append(_label(id, verdict))
            kinds.append([Kind.SCAFFOLD] * 4 + [Kind.WRONG if wrong else Kind.RIGHT])
    for i in range(ordinary):
        id = f"prose/ordinary/p{i}/0"
        split = ("fit", "fit", "test")[i % 3]
        answers.append(make_answer(question=f"Tell {i}", gold=(), id=id, source="p", split=split))
        labels.append(_label(id, "ordinary"))
        kinds.append([Kind.PROSE] * 40)
    kind = np.concatenate(kinds)
    cett = random.gamma(2.0, 0.01, (len(kind), LAYERS * WIDTH)).astype(np.float32)
    cett[np.ix_(kind == Kind.WRONG, PLANTED)] += 0.05
    cett[np.array(noise, np.int64)] = 10 * np.random.default_rng(1).random(
        (len(noise), cett.shape[1])
    )
    counts = [len(one) for one in kinds]
    header = FeaturesHeader(
        model=ModelIdentity(
            model_id="tiny", revision="", config_digest="c", weights_fingerprint="w",
            tokenizer_sha256="t", chat_template_sha256="c", dtype="float32", num_layers=LAYERS,
            intermediate_size=WIDTH, hidden_size=8, vocab_size=10,
        ),
        formula_version=FORMULA_VERSION,
        position="read",
        labels_sha256="",
        residual_layers=(2,),
        residual_dtype="float32",
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    info = ShardInfo(header=header, ids=tuple(answer.id for answer in answers))
    save_file(
        {
            "cett": torch.from_numpy(cett),
            "residual": torch.from_numpy(random.standard_normal((len(kind), 1, 8)).astype("f4")),
            "logprob": torch.from_numpy(-random.gamma(1.0, 1.0, len(kind)).astype("f4")),
            "entropy": torch.from_numpy(random.gamma(1.0, 1.0, len(kind)).astype("f4")),
            "answer": torch.repeat_interleave(torch.tensor(counts)).int(),
            "token": torch.cat([torch.arange(count) for count in counts]).int(),
            "kind": torch.from_numpy(kind.astype(np.uint8)),
            "whole": torch.from_numpy(
                random.standard_normal((len(answers), len(WHOLE))).astype("f4")
            ),
        },
        folder / "shard-00000.safetensors",
        {SHARD_KEY: msgspec.json.encode(info).decode()},
    )
    return join(load_features(folder), answers, labels, Split(seed=0))


def _label(id: str, verdict: str) -> Label:
    found = msgspec.convert(
        {"id": id, "verdict": verdict, "span": [], "tokens": [], "others": [], "dropped": ""}, Label
    )
    return found
