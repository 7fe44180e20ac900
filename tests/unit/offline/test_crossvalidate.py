"""Nested cross-validation: every unit is unseen once, and nothing of it leaks into that fit."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from offline import crossvalidate as verb
from offline.crossvalidate import CrossValidation, crossvalidate, mean_rows, outer_splits, table
from offline.dataset import Dataset
from offline.fit import fit
from offline.fit_result import FitResult, FitSettings
from offline.heads import HeadSettings
from offline.splits import plain
from probes.card import EvaluationRow
from tests.unit.offline.conftest import MakeAnswer
from tests.unit.offline.test_fit import _dataset

SETTINGS = FitSettings(
    seed=0,
    heads=HeadSettings(solver="liblinear", strengths=(0.05,), penalties=(0.03,)),
    max_neurons=40,
    budgets=(1.0,),
    folds=2,
    window=8,
)


@pytest.fixture
def data(tmp_path: Path, make_answer: MakeAnswer) -> Dataset:
    return _dataset(tmp_path / "features", make_answer)


def units(data: Dataset, part: str) -> set[str]:
    judged = [bool(answer.gold) for answer in data.answers]
    return set(data.unit[(data.part == part) & np.array(judged)[data.features.answer]].tolist())


def test_every_relation_is_the_test_once_and_then_in_no_fit(data: Dataset) -> None:
    """And the long ordinary answers stay where their file puts them."""
    splits = list(outer_splits(data, SETTINGS, 4))
    tested = [units(split, "test") for split in splits]
    assert sorted(unit for one in tested for unit in one) == sorted(
        units(data, "fit") | units(data, "test")
    )
    for split, held in zip(splits, tested, strict=True):
        assert not held & units(split, "fit")
        assert split.ordinary("test").tolist() == data.ordinary("test").tolist()
        assert len(split.ordinary("fit")) == len(data.ordinary("fit"))


def test_a_question_of_several_relations_is_not_fitted_on_where_it_is_tested(data: Dataset) -> None:
    """Its units may lie in several splits: the answer would be known from the other one."""
    asked = data.answers[0]
    twins = [
        msgspec.structs.replace(answer, question=asked.question)
        if i in (31, 60, 100, 120, 186)
        else answer
        for i, answer in enumerate(data.answers)
    ]
    object.__setattr__(data, "answers", tuple(twins))
    excluded = 0
    for split in outer_splits(data, SETTINGS, 4):
        part = split.part[split.first[:-1]]
        tested = {plain(answer) for i, answer in enumerate(twins) if part[i] == "test"}
        fitted = {
            plain(answer) for i, answer in enumerate(twins) if part[i] == "fit" and answer.gold
        }
        assert not tested & fitted
        excluded += int((part == "excluded").sum())
    assert excluded > 0


def test_a_question_that_is_ordinary_prose_of_the_test_is_not_fitted_on(data: Dataset) -> None:
    """The other way in for what must be unseen."""
    prompt = data.answers[data.ordinary("test")[0]]
    twins = tuple(
        msgspec.structs.replace(answer, question=prompt.question) if i == 31 else answer
        for i, answer in enumerate(data.answers)
    )
    object.__setattr__(data, "answers", twins)
    parts = [split.part[split.first[31]] for split in outer_splits(data, SETTINGS, 4)]
    assert sorted(parts) == ["excluded", "excluded", "excluded", "test"]


def test_the_planted_probe_is_as_good_on_every_split_and_a_stopped_run_goes_on(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done before a kill is not done again; for another fit it is."""
    like = fit(data, SETTINGS)
    done: list[int] = []

    def counting(outer: Dataset, settings: FitSettings) -> FitResult:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return fit(outer, settings)

    def further(outer: Dataset, settings: FitSettings) -> FitResult:
        done.append(1)
        return fit(outer, settings)

    monkeypatch.setattr(verb, "fit", counting)
    with pytest.raises(KeyboardInterrupt):
        crossvalidate(data, like, tmp_path, splits=3)
    monkeypatch.setattr(verb, "fit", further)
    found = crossvalidate(data, like, tmp_path, splits=3)
    assert len(done) == 3
    assert crossvalidate(data, like, tmp_path, splits=3) == found
    assert len(done) == 3
    claims = "claims, unseen relations and questions"
    (row,) = [
        row
        for row in found.rows
        if (row.dataset, row.detector, row.metric) == (claims, "probe", "auroc")
    ]
    assert row.value > 0.9
    assert row.n == 240
    assert f"{claims:<70} probe" in table(found)
    found.save(tmp_path / "crossvalidation.json")
    assert CrossValidation.load(tmp_path / "crossvalidation.json") == found
    other = fit(data, msgspec.structs.replace(SETTINGS, max_neurons=30))
    crossvalidate(data, other, tmp_path, splits=3)
    assert len(done) == 6


def test_a_mean_has_students_interval() -> None:
    """With three splits 4.30 standard errors on either side (Student, two degrees)."""
    splits = [[row_of(0.5)], [row_of(0.6)], [row_of(0.7)]]
    (mean,) = mean_rows(splits)
    assert mean.value == pytest.approx(0.6)
    assert mean.high is not None
    assert mean.high - mean.value == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert mean.n == 30
    (mean,) = mean_rows([[row_of(0.9)], [row_of(1.0)], [row_of(0.98)]])
    assert mean.high == 1.0


def test_one_split_may_lack_a_row_and_a_row_counts_once_a_split() -> None:
    """Two budgets with as many neurons have one name, and would pass for two splits."""
    rare = row_of(0.8, dataset="rare")
    splits = [[row_of(0.5), rare], [row_of(0.6), rare, rare], [row_of(0.7)]]
    assert [(row.dataset, row.n) for row in mean_rows(splits)] == [("d", 30), ("rare", 20)]
    assert [row.dataset for row in mean_rows([[rare, rare], [row_of(0.5)], [row_of(0.5)]])] == ["d"]


def test_what_no_split_holds_out_has_no_interval_over_splits() -> None:
    """Five times the same answers: log-probability had an interval of width nothing."""
    same = ("answers, nq, never trained on, as asked", "tokens of ordinary long answers: code")
    splits = [[row_of(0.5), *(row_of(0.8, dataset=name) for name in same)]] * 3
    assert [row.dataset for row in mean_rows(splits)] == ["d"]


def row_of(value: float, dataset: str = "d") -> EvaluationRow:
    return EvaluationRow(dataset=dataset, detector="probe", metric="auroc", value=value, n=10)
