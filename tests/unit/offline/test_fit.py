"""The fit finds what was planted, folds its scaler, and never touches what judges it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from offline import metrics
from offline.baselines import token_detectors
from offline.dataset import Dataset, join
from offline.evaluate import evaluate
from offline.extract import SHARD_KEY, WHOLE, FeaturesHeader, Kind, ShardInfo
from offline.features import load_features
from offline.fit import (
    LOGIT_SPREAD,
    FitResult,
    FitSettings,
    choose,
    choose_rows,
    fit,
    l1_path,
    mixture,
    pooled,
    standardise,
)
from offline.records import Answer, Label, RecordError
from probes.calibration import calibrate
from probes.card import ModelIdentity
from probes.cett import FORMULA_VERSION
from probes.spans import Pooling

MakeAnswer = Callable[..., Answer]

LAYERS, WIDTH = 4, 30
PLANTED = (7, 40, 41, 100)
SETTINGS = FitSettings(solver="liblinear", max_neurons=40)


def test_a_folded_probe_reads_raw_features_as_the_fit_reads_scaled_ones(
    data: Dataset,
) -> None:
    """Trap 15: the reference fits raw features and ships weights that fit nothing else."""
    result = fit(data, SETTINGS)
    rows = choose_rows(data, SETTINGS)
    x = data.features.cett(rows)
    mean, scale = standardise(x)
    for strength, weight, bias in l1_path(
        x, data.features.kind[rows] == Kind.WRONG, SETTINGS.strengths, solver="liblinear"
    ):
        if strength == result.chosen.strength:
            scaled = x.astype(np.float64) @ weight + bias
            raw = result.chosen.logits(data.features, rows)
            assert raw.std() == pytest.approx(LOGIT_SPREAD, rel=1e-4)
            assert raw == pytest.approx(scaled * LOGIT_SPREAD / scaled.std(), abs=1e-5)
            break
    else:
        pytest.fail("the chosen strength is not on the path")
    assert scale.shape == mean.shape == (LAYERS * WIDTH,)


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
    answered = data.answered("test")
    wrong = data.hallucinated(answered)
    logits = pooled(data, result.chosen, answered, Pooling("max_window", 2))
    assert logits[wrong].mean() > logits[~wrong].mean() + LOGIT_SPREAD
    risk = calibrate(result.response, logits)
    assert risk[wrong].mean() > risk[~wrong].mean()


def test_only_the_fit_part_is_fitted_on_and_only_the_calibration_part_chooses(
    data: Dataset,
) -> None:
    """Changing every test row changes nothing in the result: no leak from what judges it."""
    before = fit(data, SETTINGS)
    broken = data.features.kind.copy()
    broken[data.part == "test"] = Kind.UNJUDGED
    features = with_kinds(data, broken)
    assert fit(features, SETTINGS) == before
    assert set(data.part[choose_rows(data, SETTINGS)]) == {"fit"}
    assert set(data.part[mixture(data, "calibrate")]) == {"calibrate"}


def test_right_claims_are_repeated_until_they_weigh_what_the_settings_say(data: Dataset) -> None:
    settings = msgspec.structs.replace(SETTINGS, right_per_wrong=3.0)
    kinds = data.features.kind[choose_rows(data, settings)]
    right, wrong = int((kinds == Kind.RIGHT).sum()), int((kinds == Kind.WRONG).sum())
    assert right / wrong == pytest.approx(3.0, abs=0.6)


def test_one_class_alone_is_refused(data: Dataset) -> None:
    kind = data.features.kind.copy()
    kind[kind == Kind.RIGHT] = Kind.UNJUDGED
    with pytest.raises(RecordError, match="0 of right ones"):
        fit(with_kinds(data, kind), SETTINGS)


def test_a_budget_that_nothing_meets_is_refused() -> None:
    with pytest.raises(RecordError, match="max_neurons"):
        choose([])


def test_settings_and_result_come_back_from_their_file(data: Dataset, tmp_path: Path) -> None:
    """Trap 11: two of the reference's flags could not be switched off."""
    settings = FitSettings(
        seed=3, transfer=("nq",), solver="liblinear", max_neurons=17, pooling=Pooling("max", 1)
    )
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
    responses = {
        row.detector: row
        for row in table.rows
        if row.metric == "auroc" and row.dataset.startswith("responses")
    }
    assert {
        "probe", "-logprob_mean", "-logprob_min", "-logprob_sum", "entropy_mean", "entropy_max",
        "length", "words of the question", "random neurons, as many", "residual layer 2, dense",
    } <= set(responses)  # fmt: skip
    assert len({row.n for row in responses.values()}) == 1
    probe = responses["probe"]
    assert probe.low is not None
    assert probe.high is not None
    assert probe.low <= probe.value <= probe.high
    assert probe.value > 0.9
    assert responses["length"].value < 0.7
    assert {row.metric for row in table.rows} >= {"auprc", "ece", "brier", "recall_at_5_fpr"}
    assert {found.level for found in table.reliability} == {"token", "response"}


def test_a_baseline_sees_the_same_rows_as_the_probe(data: Dataset) -> None:
    result = fit(data, SETTINGS)
    rows = data.rows("test", Kind.WRONG, Kind.RIGHT)
    scores = token_detectors(data, result, rows)
    assert all(len(score) == len(rows) and np.isfinite(score).all() for score in scores.values())
    assert scores["-logprob"] == pytest.approx(-data.features.logprob[rows])


def with_kinds(data: Dataset, kind: np.ndarray) -> Dataset:
    """`data` with other kinds of tokens."""
    return dataclasses.replace(data, features=dataclasses.replace(data.features, kind=kind))


def _dataset(folder: Path, make_answer: MakeAnswer) -> Dataset:
    """40 relations of 6 answers of 5 tokens, the last of them the claim; 9 ordinary answers.

    Planted neurons fire on the claims of wrong answers only.
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
    for i in range(9):
        id = f"prose/ordinary/p{i}/0"
        split = ("fit", "held_out", "test")[i % 3]
        answers.append(make_answer(question=f"Tell {i}", gold=(), id=id, source="p", split=split))
        labels.append(_label(id, "ordinary"))
        kinds.append([Kind.PROSE] * 40)
    kind = np.concatenate(kinds)
    cett = random.gamma(2.0, 0.01, (len(kind), LAYERS * WIDTH)).astype(np.float32)
    cett[np.ix_(kind == Kind.WRONG, PLANTED)] += 0.05
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
    return join(load_features(folder), answers, labels, transfer=frozenset(), seed=0)


def _label(id: str, verdict: str) -> Label:
    found = msgspec.convert(
        {"id": id, "verdict": verdict, "span": [], "tokens": [], "others": [], "dropped": ""}, Label
    )
    return found
