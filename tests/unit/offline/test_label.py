"""Labels: every answer keeps a line with a verdict or a reason; counts can be made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from transformers import PreTrainedTokenizerFast

from offline import label as verb
from offline.models import LoadedTokenizer
from offline.records import Answer, Header, Label, RecordError, read_records, write_records

MakeAnswer = Callable[..., Answer]


def test_a_right_a_wrong_and_an_evasive_answer(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Trap 20: one boolean, named for what it means, and a third class that is neither."""
    right = verb.label_one(make_answer(), tokenizer)
    wrong = verb.label_one(make_answer("The capital of Poland is Krakow."), tokenizer)
    evasive = verb.label_one(make_answer("The capital of Poland is not a place."), tokenizer)
    assert (right.verdict, right.hallucinated) == ("right", False)
    assert (wrong.verdict, wrong.hallucinated) == ("wrong", True)
    assert (evasive.verdict, evasive.dropped) == ("abstained", verb.ABSTAINED)
    with pytest.raises(ValueError, match="neither"):
        _ = evasive.hallucinated


def test_span_and_scaffold_tokens_lie_inside_the_answer_and_never_overlap(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Traps 8 and 9: indices are into the written ids; the prompt and its header are not among
    them, whatever the chat template."""
    answer = make_answer()
    label = verb.label_one(answer, tokenizer)
    assert answer.text[slice(*label.span[0])] == "Warsaw"
    written = bytes(answer.token_ids[i] for i in label.tokens).decode()
    assert written.strip() == "Warsaw"
    assert not set(label.tokens) & set(label.others)
    assert max(*label.tokens, *label.others) < len(answer.token_ids) - 1


def test_ids_that_do_not_decode_to_the_text_are_refused_and_counted(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Trap 7: a round trip that differs would shift every span."""
    answer = msgspec.structs.replace(make_answer(), text="The capital of Poland is Warsaw")
    assert verb.label_one(answer, tokenizer).dropped == verb.ROUND_TRIP


def test_an_answer_without_a_claim_is_dropped_with_its_reason(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Trap 10: no span, no feature row, and it is counted."""
    label = verb.label_one(make_answer("The capital of Poland is"), tokenizer)
    assert (label.dropped, label.tokens) == (verb.NO_SPAN, ())


def test_every_token_of_an_ordinary_answer_is_a_negative(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    answer = make_answer("Once upon a time", "Tell a story", (), id="prose/ordinary/p1/0")
    label = verb.label_one(answer, tokenizer)
    assert label.verdict == "ordinary"
    assert label.others == tuple(range(16))


def test_k_of_n_must_agree_and_the_commonest_text_stands_for_the_question(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The paper keeps ten of ten; the rule is a parameter, and a mixed question is no label."""
    texts = ["It is Krakow.", "It is Lodz.", "It is Lodz.", "It is Warsaw."]
    answers = [make_answer(text, id=f"set/complete/q1/{i}") for i, text in enumerate(texts)]
    labels = [verb.label_one(answer, tokenizer) for answer in answers]
    kept = verb.apply_agreement(answers, labels, agree=3)
    assert [label.dropped for label in kept] == [
        verb.NOT_TYPICAL, "", verb.NOT_TYPICAL, verb.NOT_TYPICAL,
    ]  # fmt: skip
    assert all(label.verdict == "mixed" for label in verb.apply_agreement(answers, labels, agree=4))


def test_wrong_answers_are_kept_in_proportion_to_the_right_ones_of_their_group(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Unbalanced groups teach a probe the group: the relation alone reached AUROC .739."""
    answers = [
        *(make_answer(id=f"set/complete/r{i}/0", group="easy") for i in range(2)),
        *(make_answer("It is Lodz.", id=f"set/complete/w{i}/0", group="easy") for i in range(9)),
        *(make_answer("It is Lodz.", id=f"set/complete/h{i}/0", group="hard") for i in range(5)),
    ]
    labels = [verb.label_one(answer, tokenizer) for answer in answers]
    kept = verb.used(verb.balance(answers, labels, 1.5))
    assert sum(label.verdict == "right" for label in kept) == 2
    assert sum(label.verdict == "wrong" for label in kept) == 3


def test_the_file_has_a_line_for_every_answer_in_an_order_that_does_not_depend_on_arrival(
    tmp_path: Path, make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast, header: Header
) -> None:
    answers = [make_answer(id=f"set/complete/q{i}/0") for i in (3, 1, 2)]
    loaded = LoadedTokenizer(tokenizer, "t", "c")
    bodies = []
    for order in (answers, answers[::-1]):
        write_records(tmp_path / "answers.jsonl", header, order)
        funnel = verb.label_answers(
            tmp_path / "answers.jsonl",
            tmp_path / "labels.jsonl",
            tokenizer=loaded,
            agree=1,
            wrong_per_right=0,
        )
        assert funnel == {"used: right": 3}
        bodies.append((tmp_path / "labels.jsonl").read_bytes().split(b"\n")[1:])
    assert bodies[0] == bodies[1]
    assert len(read_records(tmp_path / "labels.jsonl", Label)[1]) == 3


def test_answers_of_another_tokenizer_are_refused(
    tmp_path: Path, make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast, header: Header
) -> None:
    write_records(tmp_path / "answers.jsonl", header, [make_answer()])
    with pytest.raises(RecordError, match="tokenizer_sha256"):
        verb.label_answers(
            tmp_path / "answers.jsonl",
            tmp_path / "labels.jsonl",
            tokenizer=LoadedTokenizer(tokenizer, "other", "c"),
            agree=1,
            wrong_per_right=0,
        )
