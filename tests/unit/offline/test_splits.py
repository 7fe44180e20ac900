"""No relation and no question on two sides of a split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec
import pytest

from offline.records import Answer, RecordError
from offline.splits import TEST_SHARE, Split, assign, check_disjoint, folds

MakeAnswer = Callable[..., Answer]


def _relations(make_answer: MakeAnswer) -> list[Answer]:
    return [
        make_answer(
            question=f"The r{g} of thing{i} is", id=f"wiki/{style}/q{g}-{i}/0", group=f"r{g}",
            source="wiki",
        )
        for g in range(40)
        for i, style in enumerate(["complete", "ask"])
    ]  # fmt: skip


def test_relations_are_whole_across_styles_and_shares_hold(make_answer: MakeAnswer) -> None:
    """Trap 18: the reference draws train and test ids independently; its sets overlap."""
    answers = _relations(make_answer)
    units, parts = assign(answers, Split(seed=0))
    of_relation: dict[str, set[str]] = {}
    for answer in answers:
        of_relation.setdefault(answer.group, set()).add(parts[answer.id])
        assert units[answer.id] == f"wiki/{answer.group}"
    assert all(len(found) == 1 for found in of_relation.values())
    counts = Counter(parts.values())
    assert set(counts) == {"fit", "test"}
    assert counts["test"] == pytest.approx(80 * TEST_SHARE, abs=12)  # each relation draws its own


def test_more_answers_move_no_relation_into_another_part(make_answer: MakeAnswer) -> None:
    """What was once in the test was never looked at, and must stay where it is."""
    answers = _relations(make_answer)
    few, many = (assign(a, Split(seed=0))[1] for a in (answers[:20], answers))
    assert all(many[id] == part for id, part in few.items())
    other = assign(answers, Split(seed=1))[1]
    assert other != many


def test_folds_are_alike_in_rows_and_tear_no_unit() -> None:
    """The answers of one relation resemble each other: in two folds they would judge themselves."""
    units = [f"u{i}" for i in range(30) for _ in range(1 + i % 7)]
    found = folds(units, 5, seed=0)
    assert len({(unit, fold) for unit, fold in zip(units, found, strict=True)}) == 30
    sizes = Counter(found)
    assert set(sizes) == set(range(5))
    assert max(sizes.values()) - min(sizes.values()) <= 2
    assert found != folds(units, 5, seed=1)


def test_a_source_of_few_groups_is_split_by_normalised_question(make_answer: MakeAnswer) -> None:
    """Two trivia sites are no groups; one question with other punctuation is the same question."""
    texts = [
        "Who wrote Hamlet?",
        "who wrote HAMLET",
        *(f"Q{letter}?" for letter in "abcdefghijklmnopqrst"),
    ]
    answers = [
        make_answer(question=text, id=f"trivia/ask/q{i}/0", group="tc", source="trivia")
        for i, text in enumerate(texts)
    ]
    units, parts = assign(answers, Split(seed=0))
    assert units[answers[0].id] == units[answers[1].id]
    assert parts[answers[0].id] == parts[answers[1].id]
    assert set(parts.values()) == {"fit", "test"}


def test_the_split_does_not_depend_on_the_order_of_answers(make_answer: MakeAnswer) -> None:
    answers = _relations(make_answer)
    assert assign(answers, Split(seed=3)) == tuple(map(dict, assign(answers[::-1], Split(seed=3))))


def test_a_leak_is_an_error(make_answer: MakeAnswer) -> None:
    """Asserted at load: a question that a transfer source shares with the fit is a leak too."""
    answers = [make_answer(id="a/ask/1/0"), make_answer(id="b/ask/2/0")]
    with pytest.raises(RecordError, match="leaks"):
        check_disjoint(
            answers,
            {a.id: a.id for a in answers},
            {answers[0].id: "fit", answers[1].id: "test"},
        )


def test_a_transfer_source_that_nobody_asked_is_refused(make_answer: MakeAnswer) -> None:
    """`--transfer nq.jsonl`, for a stem, would fit on what is never to be trained on."""
    answers = _relations(make_answer)
    with pytest.raises(RecordError, match=r"'wiki\.jsonl' is the stem of no .* these are: wiki$"):
        assign(answers, Split(frozenset({"wiki.jsonl"})))


def test_a_relation_of_two_sources_is_one_unit(make_answer: MakeAnswer) -> None:
    """Each file would draw a part of its own: what is fitted on in one would be tested in another,
    however few groups that one has. Ordinary prose and rows without a group have no relation."""
    wiki = _relations(make_answer)
    few = [msgspec.structs.replace(a, id=f"copy/{a.id}", source="copy") for a in wiki[:10]]
    few += [make_answer(id="copy/ask/none/0", source="copy", group="", question="Who?")]
    prose = [
        make_answer(id=f"p{g}/ordinary/x/0", source=f"p{g}", group="r0", gold=(), question=f"T {g}")
        for g in range(2)
    ]
    alone = assign(wiki, Split(seed=0))[1]
    units, parts = assign([*few, *prose, *wiki], Split(seed=0))
    assert {answer.id: parts[answer.id] for answer in wiki} == alone
    for answer in few[:10]:
        assert units[answer.id] == f"wiki/{answer.group}"
        assert parts[answer.id] == alone[answer.id.removeprefix("copy/")]
    assert units["copy/ask/none/0"] == "who"
    assert units["p0/ordinary/x/0"] == "p0/ordinary/x"


def test_later_verbs_split_by_what_the_labels_say() -> None:
    """Told again, `fit` could be told otherwise, and fit on what `label` kept for the test."""
    assert Split.of({"transfer": "", "split_seed": "7", "judge": "alias"}) == Split(seed=7)
    assert Split.of({"transfer": "nq,movies", "split_seed": "1"}) == (
        frozenset({"nq", "movies"}),
        1,
    )


def test_a_transfer_question_that_is_also_fitted_on_is_excluded(make_answer: MakeAnswer) -> None:
    """NQ-Open and TriviaQA share a question; counted as transfer it would be a leak."""
    answers = [
        make_answer(question="Who wrote Hamlet?", id="trivia/ask/1/0", source="trivia"),
        make_answer(question="who wrote hamlet", id="nq/ask/1/0", source="nq"),
        make_answer(question="who wrote emma", id="nq/ask/2/0", source="nq"),
    ]
    parts = assign(answers, Split(frozenset({"nq"}), 0))[1]
    assert [parts[answer.id] for answer in answers][1:] == ["excluded", "transfer"]


def test_a_question_of_two_groups_stays_in_the_test_alone(make_answer: MakeAnswer) -> None:
    """Question files repeat themselves; a run must not end in `label` for it, when all is asked."""
    answers = _relations(make_answer)
    parts = assign(answers, Split(seed=0))[1]
    fitted, tested = (next(a for a in answers if parts[a.id] == part) for part in ("fit", "test"))
    twin = make_answer(
        question=tested.question.upper(), id="wiki/ask/twin/0", group=fitted.group, source="wiki"
    )
    parts = assign([*answers, twin], Split(seed=0))[1]
    assert (parts[twin.id], parts[tested.id], parts[fitted.id]) == ("excluded", "test", "fit")


def test_ordinary_prompts_follow_their_file_or_a_hash(make_answer: MakeAnswer) -> None:
    """`split` is optional: without it a run died in `label`, when all was collected."""
    answers = [
        make_answer("x", f"Tell {split}", (), id=f"p/ordinary/{split}/0", split=split)
        for split in ("fit", "test")
    ]
    assert list(assign(answers, Split(seed=0))[1].values()) == ["fit", "test"]
    texts = [f"Tell me about {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] * 2
    drawn = [
        make_answer("x", text, (), id=f"p/ordinary/{i}/0", source="p")
        for i, text in enumerate(texts)
    ]
    parts = list(assign(drawn, Split(seed=0))[1].values())
    assert set(parts) == {"fit", "test"}
    assert parts[:26] == parts[26:]  # or the same prompt would be fitted on and judge
    with pytest.raises(RecordError, match="nowhere"):
        assign([make_answer("x", "T", (), split="nowhere")], Split(seed=0))
