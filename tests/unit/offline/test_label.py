"""Labels: every answer keeps a line with a verdict or a reason; counts can be made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from transformers import PreTrainedTokenizerFast

from offline import choice
from offline import label as verb
from offline.answer_spans import Located
from offline.judge import ABSTAINED, Case, by_alias
from offline.label import LabelSettings
from offline.models import LoadedTokenizer
from offline.records import Answer, Header, Label, RecordError, read_records, write_records
from offline.splits import Split, assign

MakeAnswer = Callable[..., Answer]


def _label_one(answer: Answer, tokenizer: PreTrainedTokenizerFast) -> Label:
    """By the alias rule, as the command labels where nothing else is said."""
    if not answer.gold:
        return verb.label_one(answer, tokenizer, None, None)
    case = Case(answer.id, answer.question, answer.gold, answer.text)
    said = verb.unless_cut_off(answer, by_alias(case))
    return verb.label_one(answer, tokenizer, said, verb.locate(answer, said.verdict))


def test_a_right_a_wrong_an_evasive_and_no_answer(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Trap 20: one boolean, named for what it means, and a third class that is neither."""
    right = _label_one(make_answer(), tokenizer)
    wrong = _label_one(make_answer("The capital of Poland is Krakow."), tokenizer)
    evasive = _label_one(make_answer("The capital of Poland is not a place."), tokenizer)
    assert (right.verdict, right.hallucinated) == ("right", False)
    assert (wrong.verdict, wrong.hallucinated) == ("wrong", True)
    assert (evasive.verdict, evasive.tokens, evasive.others) == ("wrong", (), ())
    declined = _label_one(make_answer("I don't know."), tokenizer)
    assert (declined.verdict, declined.dropped) == ("abstained", ABSTAINED)
    with pytest.raises(ValueError, match="neither"):
        _ = declined.hallucinated


def test_span_and_scaffold_tokens_lie_inside_the_answer_and_never_overlap(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Traps 8 and 9: indices are into the written ids; the prompt and its header are not among
    them, whatever the chat template."""
    answer = make_answer()
    label = _label_one(answer, tokenizer)
    assert answer.text[slice(*label.span[0])] == "Warsaw"
    written = bytes(answer.token_ids[i] for i in label.tokens).decode()
    assert written.strip() == "Warsaw"
    assert not set(label.tokens) & set(label.others)
    assert max(*label.tokens, *label.others) < len(answer.token_ids) - 1


TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "text after the end token": "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>--\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    "bare": "{% for m in messages %}{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("question", ["The capital of Poland is", "Is it Warsaw or Warsaw?"])
def test_tokens_are_counted_from_the_first_written_one_whatever_the_template(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast, name: str, question: str
) -> None:
    """Traps 8 and 9: the reference guesses the length of the prompt from the template, one token
    off, and counts the assistant's header, or the question itself, as output."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        return_dict=False,
    )
    answer = msgspec.structs.replace(
        make_answer("It is Lodz.", question, ("Radom",)), prompt_token_ids=tuple(prompt)
    )
    label = _label_one(answer, tokenizer)
    read = [*answer.prompt_token_ids, *answer.token_ids]
    at = [len(prompt) + i for i in label.tokens]
    assert tokenizer.decode([read[i] for i in at]).strip() == "Lodz"
    around = [len(prompt) + i for i in label.others]
    assert tokenizer.decode([read[i] for i in around]) == "Itis."  # a byte is a token


def test_ids_that_do_not_decode_to_the_text_are_refused_and_counted(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Trap 7: a round trip that differs would shift every span."""
    answer = msgspec.structs.replace(make_answer(), text="The capital of Poland is Warsaw")
    label = _label_one(answer, tokenizer)
    assert (label.verdict, label.dropped) == ("unjudged", verb.ROUND_TRIP)


def test_an_answer_without_a_claim_has_no_tokens_and_counts_as_a_whole(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Trap 10: the reference gave it the span of the answer before."""
    text = "tall trees grow slowly beside quiet rivers near ancient stone bridges everywhere"
    label = _label_one(make_answer(text), tokenizer)
    assert (label.verdict, label.dropped) == ("wrong", "")
    assert (label.span, label.tokens, label.others) == ((), (), ())


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("The capital of Poland is Kra", "unjudged"),  # half a claim
        ("The capital of Poland is not", "unjudged"),
        ("The capital of Poland, as", "unjudged"),
        ("It is Lodz, a ci", "wrong"),  # the claim is made
        ("The capital of Poland is not a place. It", "wrong"),
        ("The capital of Poland is Warsaw, a ci", "right"),
    ],
)
def test_what_was_cut_off_before_its_claim_is_no_wrong_answer(
    text: str, verdict: str, make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """ "It was in 19" may become right; labelled wrong, the probe would learn the limit."""
    whole = make_answer(text)
    assert _label_one(whole, tokenizer).verdict in ("wrong", "right")
    label = _label_one(msgspec.structs.replace(whole, finish_reason="length"), tokenizer)
    assert (label.verdict, bool(label.dropped)) == (verdict, verdict == "unjudged")


def test_a_right_claim_at_the_cut_counts_as_a_whole_only(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    cut = msgspec.structs.replace(
        make_answer("The capital of Poland is Warsaw"), finish_reason="length"
    )
    label = _label_one(cut, tokenizer)
    assert (label.verdict, label.tokens) == ("right", ())


def test_what_a_model_finds_at_the_cut_is_half_a_claim(make_answer: MakeAnswer) -> None:
    said = [Located(((24, 30),), 30), Located(((0, 3),), 3)]
    cut = msgspec.structs.replace(
        make_answer("The capital of Poland is Warsaw"[:30]), finish_reason="length"
    )
    assert [verb.unless_half(cut, found) for found in said] == [None, said[1]]
    assert verb.unless_half(msgspec.structs.replace(cut, finish_reason="stop"), said[0]) == said[0]


def test_every_token_of_an_ordinary_answer_is_a_negative(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    answer = make_answer("Once upon a time", "Tell a story", (), id="prose/ordinary/p1/0")
    label = _label_one(answer, tokenizer)
    assert label.verdict == "ordinary"
    assert label.others == tuple(range(16))


def test_k_of_n_must_agree_and_the_commonest_text_stands_for_the_question(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The paper keeps ten of ten; the rule is a parameter, and a mixed question is no label."""
    texts = ["It is Krakow.", "It is Lodz.", "It is Lodz.", "It is Warsaw."]
    answers = [make_answer(text, id=f"set/complete/q1/{i}") for i, text in enumerate(texts)]
    labels = [_label_one(answer, tokenizer) for answer in answers]
    kept = choice.apply_agreement(answers, labels, agree=3)
    assert [label.dropped for label in kept] == [
        choice.NOT_TYPICAL, "", choice.NOT_TYPICAL, choice.NOT_TYPICAL,
    ]  # fmt: skip
    assert all(
        label.verdict == "mixed" for label in choice.apply_agreement(answers, labels, agree=4)
    )


def test_wrong_answers_are_kept_in_proportion_to_the_right_ones(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Unbalanced groups teach a probe the group: the relation alone reached AUROC .739."""
    answers = [
        *(make_answer(id=f"set/complete/r{i}/0", group="easy") for i in range(2)),
        *(make_answer("It is Lodz.", id=f"set/complete/w{i}/0", group="easy") for i in range(9)),
        *(make_answer("It is Lodz.", id=f"set/complete/h{i}/0", group="hard") for i in range(5)),
    ]
    labels = [_label_one(answer, tokenizer) for answer in answers]
    kept = verb.used(
        choice.balance(answers, labels, wrong_per_right=1.5, right_per_wrong=0, inside_groups=True)
    )
    assert sum(label.verdict == "right" for label in kept) == 2
    assert not any("/h" in label.id for label in kept)
    assert sum(label.verdict == "wrong" for label in kept) == 3


def test_the_file_has_a_line_for_every_answer_in_an_order_that_does_not_depend_on_arrival(
    tmp_path: Path, make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast, header: Header
) -> None:
    answers = [make_answer(id=f"set/complete/q{i}/0") for i in (3, 1)]
    answers.append(make_answer("It is Lodz.", id="set/complete/q2/0"))
    loaded = LoadedTokenizer(tokenizer, "t", "c")
    bodies = []
    for order in (answers, answers[::-1]):
        write_records(tmp_path / "answers.jsonl", header, order)
        funnel = verb.label_answers(
            tmp_path / "answers.jsonl",
            tmp_path / "labels.jsonl",
            tokenizer=loaded,
            settings=LabelSettings(wrong_per_right=0),
        )
        assert funnel == {"used: right": 2, "used: wrong": 1}
        bodies.append((tmp_path / "labels.jsonl").read_bytes().split(b"\n")[1:])
    assert bodies[0] == bodies[1]
    assert len(read_records(tmp_path / "labels.jsonl", Label)[1]) == 3


@pytest.mark.parametrize(
    ("identity", "named"),
    [
        (("other", "c", "a" * 40), "tokenizer_sha256"),
        (("t", "c", "b" * 40), "revision aaaa"),
        (("t", "c", "files:b"), "other weights"),
    ],
)
def test_answers_of_another_model_are_refused(
    identity: tuple[str, str, str],
    named: str,
    tmp_path: Path,
    make_answer: MakeAnswer,
    tokenizer: PreTrainedTokenizerFast,
    header: Header,
) -> None:
    """Two commits, or fine-tunes, of one model share a tokenizer: nothing else tells them apart."""
    revision = "files:a" if identity[2].startswith("files:") else "a" * 40
    header = msgspec.structs.replace(header, model_revision=revision)
    write_records(tmp_path / "answers.jsonl", header, [make_answer()])
    with pytest.raises(RecordError, match=named):
        verb.label_answers(
            tmp_path / "answers.jsonl",
            tmp_path / "labels.jsonl",
            tokenizer=LoadedTokenizer(tokenizer, *identity),
            settings=LabelSettings(),
        )


@pytest.mark.parametrize(
    ("right", "wrong", "abstained", "agree", "verdict"),
    [
        (10, 0, 0, 10, "right"),
        (0, 10, 0, 10, "wrong"),
        (9, 1, 0, 10, None),
        (9, 0, 1, 10, None),
        (6, 4, 0, 6, "right"),
        (5, 5, 0, 5, None),
        (3, 4, 3, 3, "wrong"),
        (1, 0, 0, 1, "right"),
        (0, 1, 0, 1, "wrong"),
    ],
)
def test_the_rule_is_k_of_n_and_a_tie_is_no_agreement(
    make_answer: MakeAnswer,
    tokenizer: PreTrainedTokenizerFast,
    right: int,
    wrong: int,
    abstained: int,
    agree: int,
    verdict: str | None,
) -> None:
    """Ten of ten as in the paper (where one refusal drops the question), less, and greedy. Five
    right and five wrong used to be right."""
    texts = ["It is Warsaw."] * right + ["It is Lodz."] * wrong + ["I don't know."] * abstained
    answers = [make_answer(text, id=f"set/ask/q1/{i}") for i, text in enumerate(texts)]
    labels = [_label_one(answer, tokenizer) for answer in answers]
    kept = verb.used(choice.apply_agreement(answers, labels, agree))
    assert [label.verdict for label in kept] == ([verdict] if verdict else [])


def test_more_agreement_than_samples_is_refused(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Every question would be dropped, for a reason that nobody would find."""
    answer = make_answer()
    with pytest.raises(RecordError, match=r"set/complete/q1' has 1 sample\(s\), fewer than the 10"):
        choice.apply_agreement([answer], [_label_one(answer, tokenizer)], 10)


def test_groups_are_balanced_both_ways(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A model that is good at a relation teaches the relation as "right" unless it is capped."""
    answers = [make_answer(id=f"set/complete/r{i}/0") for i in range(9)]
    answers += [make_answer("It is Lodz.", id=f"set/complete/w{i}/0") for i in range(3)]
    labels = [_label_one(answer, tokenizer) for answer in answers]
    kept = verb.used(choice.balance(answers, labels, wrong_per_right=1, right_per_wrong=1))
    assert [label.verdict for label in kept].count("right") == 3
    assert [label.verdict for label in kept].count("wrong") == 3


def test_a_source_is_balanced_as_a_whole_and_its_groups_on_request(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Answers are ranked as people meet them: a relation that is never right keeps its answers."""
    answers = [make_answer(id=f"set/complete/r{i}/0", group="easy") for i in range(4)]
    answers += [
        make_answer("It is Lodz.", id=f"set/complete/w{i}/0", group="hard") for i in range(20)
    ]
    labels = [_label_one(answer, tokenizer) for answer in answers]
    whole = choice.balance(answers, labels, wrong_per_right=3, right_per_wrong=0)
    inside = choice.balance(
        answers, labels, wrong_per_right=3, right_per_wrong=0, inside_groups=True
    )
    assert [label.verdict for label in verb.used(whole)].count("wrong") == 12
    assert [label.verdict for label in verb.used(inside)].count("wrong") == 0


def test_what_judges_the_probe_keeps_all_that_was_asked(
    make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Dropping wrong answers from the test would make it easier, or harder, than real use."""
    answers = [
        make_answer(
            text=f"It is {'Warsaw' if i == 0 else 'Lodz'}.", id=f"set/complete/q{g}-{i}/0",
            group=f"r{g}", question=f"The r{g} of x{i} is",
        )
        for g in range(40)
        for i in range(6)
    ]  # fmt: skip
    labels = [_label_one(answer, tokenizer) for answer in answers]
    settings = verb.LabelSettings(wrong_per_right=1.0)
    even = choice.balance(answers, labels, wrong_per_right=1.0, right_per_wrong=0)
    kept = verb.spare(answers, labels, even, settings)
    _, parts = assign(answers, Split(seed=settings.split_seed))
    dropped = {label.id for label in kept if label.dropped}
    assert len(dropped) > 50
    assert {parts[id] for id in dropped} == {"fit"}
    assert "test" in set(parts.values())


def test_a_class_that_is_empty_is_refused_and_the_file_says_why(
    tmp_path: Path, make_answer: MakeAnswer, tokenizer: PreTrainedTokenizerFast, header: Header
) -> None:
    """A fit on one class is an error ten minutes later, in words of another library."""
    answers = [make_answer(id="set/ask/q0/0"), make_answer("I don't know.", id="set/ask/q1/0")]
    write_records(tmp_path / "answers.jsonl", header, answers)
    with pytest.raises(RecordError, match=r"no wrong answer is left.*1 declines to answer"):
        verb.label_answers(
            tmp_path / "answers.jsonl",
            tmp_path / "labels.jsonl",
            tokenizer=LoadedTokenizer(tokenizer, "t", "c"),
            settings=LabelSettings(),
        )
    labels = read_records(tmp_path / "labels.jsonl", Label)[1]
    assert [label.dropped for label in labels] == ["", ABSTAINED]


def test_the_paper_rule_is_one_flag_and_each_part_of_it_can_be_said_otherwise() -> None:
    """Trap 11."""
    assert verb.label_settings(True, agree=None) == verb.PAPER
    assert verb.label_settings(False, agree=None) == LabelSettings()
    assert verb.label_settings(True, agree=7, wrong_per_right=0.0).agree == 7
    assert (verb.PAPER.agree, verb.PAPER.wrong_per_right) == (10, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge": "oracle"}, "'oracle' is not one of alias, exact, regex, llm, nli"),
        ({"spans": "guess"}, "'guess' is not one of rule, llm"),
        ({"judge": "llm"}, "--judge-url and --judge-model"),
        ({"judge": "nli"}, "--judge-model"),
        (
            {"judge": "nli", "spans": "llm", "judge_url": "u", "judge_model": "m"},
            "two models",
        ),
        ({"judge_url": "u", "judge_model": "m"}, "--judge-url is asked by --judge llm or"),
        ({"judge": "exact", "judge_model": "m"}, "--judge-model is of --judge llm"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        LabelSettings(**settings)  # type: ignore[arg-type]
