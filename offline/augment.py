"""Verb `augment`: more answers to fit the answer head on than what the model said first.

How often a small model is right limits a probe more than how it is fitted. Both kinds are runs
within the run, of questions of its fit part; nothing is chosen, calibrated or judged by them.

samples  the questions asked again at a temperature: what is neither said already nor surplus
told     statements that nobody sampled: the question completed by its accepted answer, and by what
         another row of the same relation accepts

The token head does not see them: it learned to tell wrong from right claims a little better and
claims from everything else worse (docs/decisions/two-heads.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from offline.choice import WRONG_PER_RIGHT, balance
from offline.collect import Sampling
from offline.questions import Question, question_of, shuffle_key
from offline.records import (
    Answer,
    Label,
    RecordError,
    Verdict,
    read_labelled,
    sha256,
    write_records,
)
from offline.splits import Split, assign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES, TOLD = "augmented/samples", "augmented/told"
TEMPERATURE = 0.7
STATEMENTS = "complete"  # the style whose questions an answer makes a sentence of
SHORT = ("complete", "answer_only")  # asked again: sentences cost most and add least
SAID = "the same text was sampled before"


def require_asked(run: Path, *, samples: int, told: bool) -> None:
    """RecordError when `run` holds what is not asked for now: `fit` would use it."""
    for name, asked in ((SAMPLES, samples), (TOLD, told)):
        if (run / name).exists() and not asked:
            option = "--more-samples" if name == SAMPLES else "--told"
            raise RecordError(f"{run / name} is there from before; delete it, or say {option}")


def sampling(samples: int, seed: int, max_tokens: int | None) -> Sampling:
    """Near what the model says greedily, which is what people read."""
    return Sampling(samples=samples, temperature=TEMPERATURE, seed=seed, max_tokens=max_tokens)


def questions_of_fit(answers: Sequence[Answer], split: Split) -> list[Question]:
    """Questions of the fit part that are answered in few words."""
    return [question_of(a) for a in _fitted(answers, split) if a.style in SHORT]


def keep_new(run: Path, folder: Path) -> None:
    """Drop from the labels of `folder` what repeats a text of the run, or an earlier sample, and
    what is then surplus."""
    header, answers, said, labels = read_labelled(folder)
    texts = {(answer.question_id, answer.text) for answer in read_labelled(run).answers}
    by_id = {answer.id: answer for answer in answers}
    kept: list[Label] = []
    for label in labels:
        text = (by_id[label.id].question_id, by_id[label.id].text)
        if not label.dropped and text in texts:
            label = msgspec.structs.replace(label, dropped=SAID)
        texts.add(text)
        kept.append(label)
    kept = balance(
        [by_id[label.id] for label in kept],
        kept,
        wrong_per_right=WRONG_PER_RIGHT,
        right_per_wrong=0.0,
    )
    said = said | {"wrong_per_right": str(WRONG_PER_RIGHT)}
    made = msgspec.structs.replace(header, kind="labels", settings=said)
    write_records(folder / "labels.jsonl", made, kept)


def tell(run: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the statements and their labels; RecordError when the run has no question for any."""
    header, answers, said, _ = read_labelled(run)
    told = list(_told(_fitted(answers, Split.of(said)), tokenizer))
    if not told:
        raise RecordError(
            f"--told needs questions of the style {STATEMENTS}, and {run} has none to fit on"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "answers.jsonl"
    write_records(path, header, [answer for answer, _ in told])
    settings = {**said, "answers_sha256": sha256(path), "judge": "none", "spans": "none"}
    made = msgspec.structs.replace(header, kind="labels", settings=settings)
    write_records(folder / "labels.jsonl", made, [label for _, label in told])


def is_told(answer: Answer) -> bool:
    """Whether `tell` made it."""
    return answer.id.startswith(f"{answer.question_id}/told ")


def _told(
    answers: Sequence[Answer], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Answer, Label]]:
    """A wrong answer is as common among wrong ones as among right ones: it is drawn row by row, or
    rarity alone would tell them apart."""
    relations: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.style == STATEMENTS:
            relations[answer.source, answer.group].append(answer)
    for rows in relations.values():
        for row in rows:
            others = [o.gold[0] for o in rows if not set(o.gold) & set(row.gold)]
            yield _statement(row, row.gold[0], "right", tokenizer)
            if others:
                draw = int(shuffle_key(f"told/{row.question_id}"), 16)
                yield _statement(row, others[draw % len(others)], "wrong", tokenizer)


def _statement(
    row: Answer, said: str, verdict: Verdict, tokenizer: PreTrainedTokenizerBase
) -> tuple[Answer, Label]:
    """Judged as a whole: none of its tokens is a claim that the model made."""
    id, text = f"{row.question_id}/told {verdict}", f"{row.question} {said}."
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    answer = msgspec.structs.replace(row, id=id, token_ids=ids, text=text, finish_reason="stop")
    return answer, Label(id=id, verdict=verdict, span=(), tokens=(), others=(), dropped="")


def _fitted(answers: Sequence[Answer], split: Split) -> list[Answer]:
    """An answer of each question of the fit part, in the order of their ids."""
    _, parts = assign(answers, split)
    of_question = {
        answer.question_id: answer
        for answer in answers
        if answer.gold and parts[answer.id] == "fit"
    }
    return [answer for _, answer in sorted(of_question.items())]
