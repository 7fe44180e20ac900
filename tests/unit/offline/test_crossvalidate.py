"""Nested cross-validation: every unit is unseen once, and nothing of it leaks into that fit."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from offline import crossvalidate as verb
from offline.crossvalidate import CrossValidation, crossvalidate, mean_rows, outer_splits, table
from offline.dataset import Dataset
from offline.fit_result import FitSettings
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
    splits = list(outer_splits(data, 4, seed=0))
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
    for split in outer_splits(data, 4, seed=0):
        part = split.part[split.first[:-1]]
        tested = {plain(answer) for i, answer in enumerate(twins) if part[i] == "test"}
        fitted = {
            plain(answer) for i, answer in enumerate(twins) if part[i] == "fit" and answer.gold
        }
        assert not tested & fitted
        excluded += int((part == "excluded").sum())
    assert excluded > 0


def test_the_planted_probe_is_as_good_on_every_split_and_a_stopped_run_goes_on(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done before a kill is not done again; under other settings it is."""
    done: list[int] = []
    fit = verb.fit

    def counting(outer: Dataset, settings: FitSettings) -> object:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return fit(outer, settings)

    monkeypatch.setattr(verb, "fit", counting)
    with pytest.raises(KeyboardInterrupt):
        crossvalidate(data, SETTINGS, tmp_path, splits=3)
    monkeypatch.setattr(verb, "fit", lambda outer, settings: done.append(1) or fit(outer, settings))
    found = crossvalidate(data, SETTINGS, tmp_path, splits=3)
    assert len(done) == 3
    again = crossvalidate(data, SETTINGS, tmp_path, splits=3)
    assert again == found
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
    crossvalidate(data, msgspec.structs.replace(SETTINGS, max_neurons=30), tmp_path, splits=3)
    assert len(done) == 6


def test_a_mean_has_students_interval_and_a_row_that_a_split_lacks_is_left_out() -> None:
    """With three splits 4.30 standard errors on either side (Student, two degrees)."""
    row = EvaluationRow(dataset="d", detector="probe", metric="auroc", value=0.0, n=10)
    splits = [[msgspec.structs.replace(row, value=value)] for value in (0.7, 0.8, 0.9)]
    splits[0].append(msgspec.structs.replace(row, metric="auprc"))
    (mean,) = mean_rows(splits)
    assert mean.value == pytest.approx(0.8)
    assert mean.high is not None
    assert mean.high - mean.value == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert mean.n == 30
