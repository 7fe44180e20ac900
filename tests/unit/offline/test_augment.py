"""What is fitted on besides: questions of the fit part, new texts, by the answer head alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from offline import augment
from offline.baselines import _factor, answer_detectors
from offline.crossvalidate import outer_splits
from offline.dataset import FITTED, OF, Dataset, augmented, load_dataset
from offline.examples import answer_examples, answer_means, token_examples
from offline.features import load_features
from offline.fit import make_examples
from offline.fit_result import FitSettings
from offline.metrics import Bools, Floats, rank
from offline.records import (
    Answer,
    Header,
    Label,
    RecordError,
    read_labelled,
    read_records,
    sha256,
    write_records,
)
from offline.shards import SHARD_KEY, WHOLE, Kind, ShardInfo
from offline.splits import Split, home
from tests.unit.offline.conftest import MakeAnswer
from tests.unit.offline.test_fit import LAYERS, WIDTH, _dataset, _label

SPLIT = Split(seed=0)
SETTINGS = FitSettings(seed=0, window=8)
NAME = augment.TOLD


@pytest.fixture
def answers(make_answer: MakeAnswer) -> list[Answer]:
    """Twelve relations of three capitals; and the first relation's questions in another style."""
    capitals = ("Rome", "Oslo", "Lima")
    return [
        make_answer(
            text=f"It is {capital}.",
            question=f"The r{g} of x{i} is",
            gold=(capital,),
            id=f"wiki/{style}/q{g}-{i}/0",
            group=f"r{g}",
            source="wiki",
        )
        for style, relations in (("complete", 12), ("ask", 1))
        for g in range(relations)
        for i, capital in enumerate(capitals)
    ]


def written(
    run: Path,
    header: Header,
    answers: Sequence[Answer],
    verdicts: Sequence[str],
    judge: str = "alias",
    **settings: str,
) -> None:
    run.mkdir(parents=True, exist_ok=True)
    write_records(run / "answers.jsonl", header, answers)
    labels = [_label(a.id, verdict) for a, verdict in zip(answers, verdicts, strict=True)]
    said = {"answers_sha256": sha256(run / "answers.jsonl"), "transfer": "", "split_seed": "0"}
    said |= {"judge": judge, **settings}
    made = msgspec.structs.replace(header, kind="labels", settings=said)
    write_records(run / "labels.jsonl", made, labels)


def test_each_statement_of_the_fit_is_told_rightly_and_wrongly(
    tmp_path: Path, answers: list[Answer], header: Header, tokenizer: PreTrainedTokenizerFast
) -> None:
    written(tmp_path, header, answers, ["right"] * len(answers))
    folder = tmp_path / NAME
    augment.tell(tmp_path, folder, tokenizer)
    _, told, _, labels = read_labelled(folder)
    asked = [
        a for a in answers if a.style == "complete" and home(f"wiki/{a.group}", SPLIT.seed) == "fit"
    ]
    assert 0 < len(asked) < 36
    assert len(told) == 2 * len(asked)
    assert {a.question_id for a in told} == {a.question_id for a in asked}
    for answer, label in zip(told, labels, strict=True):
        said = answer.text.removeprefix(f"{answer.question} ").removesuffix(".")
        assert said in ("Rome", "Oslo", "Lima")
        assert label.verdict == ("right" if said in answer.gold else "wrong")
        assert tokenizer.decode(answer.token_ids) == answer.text
        assert label.tokens == label.others == ()  # nobody claimed it


def test_an_answer_is_told_as_often_wrongly_as_rightly(
    tmp_path: Path, make_answer: MakeAnswer, header: Header, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A common answer would be right more often than wrong: no look at the model is needed."""
    said = ["Rome"] * 5 + ["Oslo", "Oslo", "Lima"]
    answers = [
        make_answer(
            question=f"The r{g} of x{i} is",
            gold=(one,),
            group=f"r{g}",
            source="wiki",
            id=f"wiki/complete/q{g}-{i}/0",
        )
        for g in range(12)
        for i, one in enumerate(said if g % 2 else ["Rome"] * 3)
    ]
    written(tmp_path, header, answers, ["right"] * len(answers))
    augment.tell(tmp_path, tmp_path / NAME, tokenizer)
    _, told, _, labels = read_labelled(tmp_path / NAME)
    counts = {"right": Counter[str](), "wrong": Counter[str]()}
    for answer, label in zip(told, labels, strict=True):
        counts[label.verdict][f"{answer.group} {answer.text.split()[-1]}"] += 1
    assert counts["right"] == counts["wrong"]
    groups = {key.split()[0] for key in counts["right"]}
    assert groups
    assert all(int(group[1:]) % 2 for group in groups)  # one answer alone cannot be wrong
    for group in groups:
        assert counts["right"][f"{group} Rome."] == 3  # of five: nobody else could take more


def test_questions_that_are_units_themselves_are_not_told(
    tmp_path: Path, answers: list[Answer], header: Header, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A fold that holds one out would meet its answer in another one's wrong statement."""
    few = [a for a in answers if a.group in ("r0", "r1")]
    written(tmp_path, header, few, ["right"] * len(few))
    with pytest.raises(RecordError, match="in ten relations or more"):
        augment.tell(tmp_path, tmp_path / NAME, tokenizer)


def test_samples_by_another_judge_or_without_anything_new_are_refused(
    tmp_path: Path, answers: list[Answer], header: Header
) -> None:
    folder = tmp_path / augment.SAMPLES
    first = answers[0]
    written(tmp_path, header, [first], ["right"])
    written(folder, header, [first], ["right"])
    with pytest.raises(RecordError, match="1 further samples gave no right answer that is new"):
        augment.keep_new(tmp_path, folder)
    written(folder, header, [first], ["right"], judge="llm")
    with pytest.raises(RecordError, match="by llm, the answers by alias; give `augment` the"):
        augment.keep_new(tmp_path, folder)


def test_a_run_whose_questions_take_sentences_is_not_asked_again(answers: list[Answer]) -> None:
    with pytest.raises(RecordError, match="--more-samples asks questions of the styles complete"):
        augment.questions_of_fit([a for a in answers if a.style == "ask"], SPLIT)


@pytest.mark.parametrize("made_for", ["", "0" * 64])
def test_what_was_made_for_other_labels_is_refused(
    tmp_path: Path,
    header: Header,
    answers: list[Answer],
    monkeypatch: pytest.MonkeyPatch,
    made_for: str,
) -> None:
    """Labels of another judge or split: a question of it may be in the test by now."""
    written(tmp_path, header, answers, ["right"] * len(answers))
    written(tmp_path / NAME, header, answers, ["right"] * len(answers), **{OF: made_for})
    own = SimpleNamespace(
        split=SPLIT, features=SimpleNamespace(header=SimpleNamespace(labels_sha256="own"))
    )
    monkeypatch.setattr("offline.dataset.join", lambda *_: own)
    monkeypatch.setattr("offline.dataset._load", lambda run: (None, read_labelled(run)))
    with pytest.raises(RecordError, match="made for other labels than"):
        load_dataset(tmp_path)


def test_without_a_statement_there_is_nothing_to_tell(
    tmp_path: Path, answers: list[Answer], header: Header, tokenizer: PreTrainedTokenizerFast
) -> None:
    asked = [a for a in answers if a.style == "ask"]
    written(tmp_path, header, asked, ["right"] * len(asked))
    with pytest.raises(
        RecordError, match=r"--told needs questions of the style complete .* leave it out"
    ):
        augment.tell(tmp_path, tmp_path / NAME, tokenizer)


def test_short_questions_of_the_fit_are_asked_again_and_no_others(answers: list[Answer]) -> None:
    asked = augment.questions_of_fit(answers, SPLIT)
    assert {question.style for question in asked} == {"complete"}
    assert {home(f"wiki/{question.group}", SPLIT.seed) for question in asked} == {"fit"}
    assert len({question.id for question in asked}) == len(asked)


def test_a_text_that_is_there_already_and_surplus_wrong_ones_are_dropped(
    tmp_path: Path, answers: list[Answer], header: Header
) -> None:
    folder = tmp_path / augment.SAMPLES
    first = answers[0]
    written(tmp_path, header, [first], ["right"])
    texts = [first.text, "Oslo.", "Oslo.", "Rome!", "Lima.", "Kiel.", "Bath."]
    samples = [
        msgspec.structs.replace(first, id=f"{first.question_id}/{i}", text=text)
        for i, text in enumerate(texts)
    ]
    written(folder, header, samples, ["right", "wrong", "wrong", "right", *["wrong"] * 3])
    augment.keep_new(tmp_path, folder)
    _, labels = read_records(folder / "labels.jsonl", Label)
    said = [label.dropped == augment.SAID for label in labels]
    assert said == [True, False, True, False, False, False, False]
    kept = [label.verdict for label in labels if not label.dropped]
    assert (kept.count("right"), kept.count("wrong")) == (1, 3)  # of four


def test_what_is_there_from_before_and_not_asked_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / augment.SAMPLES).mkdir(parents=True)
    augment.require_asked(tmp_path, samples=1, told=False)
    with pytest.raises(RecordError, match="from before; delete it, or say --more-samples"):
        augment.require_asked(tmp_path, samples=0, told=True)
    (tmp_path / augment.TOLD).mkdir(parents=True)
    with pytest.raises(RecordError, match="from before; delete it, or say --told"):
        augment.require_asked(tmp_path, samples=1, told=False)


@pytest.fixture
def data(tmp_path: Path, make_answer: MakeAnswer) -> Dataset:
    return _dataset(tmp_path / "features", make_answer)


@pytest.fixture
def more(data: Dataset, tmp_path: Path) -> Dataset:
    """One answer more to each question, of two tokens each, whose neurons all say 7."""
    return with_more(data, tmp_path / "more")


def with_more(data: Dataset, folder: Path, **header: object) -> Dataset:
    own = [a for a in data.answers if a.gold]
    answers = [
        msgspec.structs.replace(a, id=f"{a.question_id}/told", question=f"{a.question} then")
        for a in own
    ]
    labels = [_label(a.id, ("wrong", "right")[i % 2]) for i, a in enumerate(answers)]
    rows = 2 * len(answers)
    like = data.features.header
    info = ShardInfo(
        header=msgspec.structs.replace(like, labels_sha256="other", **header),
        ids=tuple(a.id for a in answers),
    )
    folder.mkdir()
    save_file(
        {
            "cett": torch.full((rows, LAYERS * WIDTH), 7.0),
            "residual": torch.full((rows, 1, 8), 5.0),
            "logprob": torch.zeros(rows),
            "entropy": torch.zeros(rows),
            "answer": torch.arange(len(answers)).repeat_interleave(2).int(),
            "token": torch.tensor([0, 1]).repeat(len(answers)).int(),
            "kind": torch.tensor([Kind.WRONG, Kind.RIGHT] * len(answers), dtype=torch.uint8),
            "whole": torch.zeros((len(answers), len(WHOLE))),
        },
        folder / "shard-00000.safetensors",
        {SHARD_KEY: msgspec.json.encode(info).decode()},
    )
    where = {
        a.question_id: str(data.unit[row])
        for a, row in zip(data.answers, data.first, strict=False)
        if data.part[row] == "fit"
    }
    return augmented(data, NAME, load_features(folder), answers, labels, where)


def test_more_answers_stand_behind_and_only_those_of_the_fit_count(
    data: Dataset, more: Dataset
) -> None:
    count = len(data.answers)
    assert more.own == count
    fitted = data.answered("fit")
    assert np.array_equal(more.answered("fit"), fitted)
    assert np.array_equal(more.answered("test"), data.answered("test"))
    added = more.answered("augmented")
    assert added.min() >= count
    assert len(added) == len(fitted)
    assert {more.answers[i].question_id for i in added} == {
        data.answers[i].question_id for i in fitted
    }
    for i in (fitted[3], added[3]):  # rows and what was read of them have moved together
        values = more.features.cett(more.rows_of(i))
        assert (values == 7.0).all() == (i >= count)
        assert len(values) == (2 if i >= count else 5)
        assert (more.features.answer[more.rows_of(i)] == i).all()
        assert more.features.ids[i] == more.answers[i].id
    assert (more.features.residual(more.rows_of(added[0]), 2) == 5.0).all()


def test_only_the_answer_head_sees_them(data: Dataset, more: Dataset) -> None:
    before, after = answer_examples(data, SETTINGS), answer_examples(more, SETTINGS)
    added = len(more.answered("augmented"))
    assert len(after.unit) >= len(before.unit) + added  # and more prose, for the share of it
    seven = (after.x == 7.0).all(axis=1)
    assert seven.sum() == added
    assert set(after.unit[seven].tolist()) <= set(before.unit.tolist())
    wrong = [more.labels[i].hallucinated for i in more.answered("augmented")]
    assert after.positive[seven].tolist() == wrong
    assert np.array_equal(token_examples(more, SETTINGS).x, token_examples(data, SETTINGS).x)


def test_rivals_choose_by_the_answers_of_the_run(
    more: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the probe does. By told statements, most of a fold, they would choose worse."""
    judged: list[int] = []

    def watched(wrong: Bools, score: Floats) -> float:
        judged.append(len(wrong))
        return rank(wrong, score)

    monkeypatch.setattr("offline.baselines.rank", watched)
    tested, own = more.answered("test"), more.answered("fit")
    seen, asked = answer_means(more, more.answered(*FITTED)), answer_means(more, tested)
    scores = answer_detectors(more, tested, seen=seen, asked=asked)
    assert np.isfinite(scores["CETT of all neurons, dense"]).all()
    assert judged
    assert max(judged) < len(own) / 3  # a fold is a quarter of them; with what augments it, half


@pytest.mark.parametrize(("rows", "width"), [(60, 400), (300, 40)])
def test_a_factor_has_the_inner_products_of_the_rows(rows: int, width: int) -> None:
    """More rows than columns, and a factor that they share: no Cholesky factor without help."""
    random = np.random.default_rng(0)
    x = (random.gamma(2.0, 1.0, (rows, width)) + 20 * random.random((rows, 1))).astype("f4")
    x[1] = x[0]
    products = (x @ x.T).astype(np.float64)
    root = _factor(products.copy())
    assert np.abs(root @ root.T - products).max() <= 1e-3 * products.max()


def test_the_papers_designs_refuse_them(more: Dataset) -> None:
    with pytest.raises(RecordError, match=r"--design 1-vs-1 .* holds augmented/told"):
        make_examples(more, FitSettings(design="1-vs-1"))


def test_features_that_were_read_otherwise_are_refused(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="augmented/told were read otherwise"):
        with_more(data, tmp_path / "more", position="write")


def test_a_split_of_crossvalidation_fits_nothing_of_what_it_tests(
    data: Dataset, more: Dataset
) -> None:
    for split, plain in zip(
        outer_splits(more, SETTINGS, 4), outer_splits(data, SETTINGS, 4), strict=True
    ):
        assert np.array_equal(split.answered("test"), plain.answered("test"))
        assert np.array_equal(split.answered("fit"), plain.answered("fit"))
        used, tested = split.answered("augmented"), split.answered("test")
        assert len(used)
        units = split.unit[split.first[:-1]]
        assert not set(units[used].tolist()) & set(units[tested].tolist())
        assert used.min() >= split.own
