"""Verb `augment`: more answers to fit the answer head on than what the model said first.

How often a small model is right limits a probe more than how it is fitted. Both kinds are runs
within the run, of questions of its fit part; nothing is chosen, calibrated or judged by them.

samples  the questions asked again at a temperature: what is neither said already nor surplus
told     statements that nobody sampled: the question completed by its accepted answer, and by what
         another row of the same relation accepts; each answer as often rightly as wrongly

The token head does not see them: it learned to tell wrong from right claims a little better and
claims from everything else worse (docs/decisions/two-heads.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from offline.choice import WRONG_PER_RIGHT, balance
from offline.collect import Sampling
from offline.dataset import AUGMENTED, OF
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

SAMPLES, TOLD = AUGMENTED
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
    """Questions of the fit part that are answered in few words; RecordError without any."""
    found = [question_of(a) for _, a in _fitted(answers, split) if a.style in SHORT]
    if not found:
        raise RecordError(
            f"--more-samples asks questions of the styles {', '.join(SHORT)} again, and there is "
            f"none to fit on; leave it out"
        )
    return found


def keep_new(run: Path, folder: Path) -> None:
    """Drop from the labels of `folder` what repeats a text of the run, or an earlier sample, and
    what is then surplus. RecordError when another judge has labelled them, or none is left."""
    header, answers, said, labels = read_labelled(folder)
    own = read_labelled(run)
    if said["judge"] != own.settings["judge"]:
        raise RecordError(
            f"the samples were judged by {said['judge']}, the answers by {own.settings['judge']}; "
            f"give `augment` the --judge that `label` had"
        )
    texts = {(answer.question_id, answer.text) for answer in own.answers}
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
    if all(label.dropped for label in kept):
        raise RecordError(
            f"{len(kept)} further samples gave no right answer that is new; delete {folder} and "
            f"leave --more-samples out"
        )
    said = said | {"wrong_per_right": str(WRONG_PER_RIGHT), OF: sha256(run / "labels.jsonl")}
    made = msgspec.structs.replace(header, kind="labels", settings=said)
    write_records(folder / "labels.jsonl", made, kept)


def tell(run: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the statements and their labels; RecordError when the run has no question for any."""
    header, answers, said, _ = read_labelled(run)
    told = list(_told(_fitted(answers, Split.of(said)), tokenizer))
    if not told:
        raise RecordError(
            f"--told needs questions of the style {STATEMENTS} to fit on, in ten relations or more "
            f"with different answers, and {run} has none; leave it out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "answers.jsonl"
    write_records(path, header, [answer for answer, _ in told])
    settings = {**said, "answers_sha256": sha256(path), "judge": "none", "spans": "none"}
    settings[OF] = sha256(run / "labels.jsonl")
    made = msgspec.structs.replace(header, kind="labels", settings=settings)
    write_records(folder / "labels.jsonl", made, [label for _, label in told])


def is_told(answer: Answer) -> bool:
    """Whether `tell` made it."""
    return answer.id.startswith(f"{answer.question_id}/told ")


def _told(
    answers: Iterable[tuple[str, Answer]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Answer, Label]]:
    """Of `(unit, answer)`: only where a relation is the unit, or what is held out of a fold would
    stand in a wrong statement that is fitted on."""
    relations: dict[str, list[Answer]] = defaultdict(list)
    for unit, row in answers:
        if row.style == STATEMENTS and row.group and "/" in unit:  # a question has lost its "/"
            relations[unit].append(row)
    for rows in relations.values():
        for row, said in _exchanged(rows):
            yield _statement(row, row.gold[0], "right", tokenizer)
            yield _statement(row, said, "wrong", tokenizer)


def _exchanged(rows: Sequence[Answer]) -> Iterator[tuple[Answer, str]]:
    """Rows of a relation, each with another one's answer: every answer as often as it is right, or
    rarity alone would tell wrong from right. Of an answer that most rows have, the surplus is left
    out: nobody could take it.

    Rows that stand sorted by their answers, moved on by as many as the commonest answer has, meet
    another answer.
    """
    by_answer: dict[str, list[Answer]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: shuffle_key(f"told/{row.question_id}")):
        by_answer[row.gold[0]].append(row)
    most = max(len(same) for same in by_answer.values())
    most = min(most, len(rows) - most)
    order = sorted(by_answer, key=lambda said: shuffle_key(f"told/{rows[0].group}/{said}"))
    kept = [row for said in order for row in by_answer[said][:most]]
    for i, row in enumerate(kept):
        said = kept[(i + most) % len(kept)].gold[0]
        if said not in row.gold:
            yield row, said


def _statement(
    row: Answer, said: str, verdict: Verdict, tokenizer: PreTrainedTokenizerBase
) -> tuple[Answer, Label]:
    """Judged as a whole: none of its tokens is a claim that the model made."""
    id, text = f"{row.question_id}/told {verdict}", f"{row.question} {said}."
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    answer = msgspec.structs.replace(row, id=id, token_ids=ids, text=text, finish_reason="stop")
    return answer, Label(id=id, verdict=verdict, span=(), tokens=(), others=(), dropped="")


def _fitted(answers: Sequence[Answer], split: Split) -> list[tuple[str, Answer]]:
    """`(unit, answer)` of each question of the fit part, in the order of their ids."""
    units, parts = assign(answers, split)
    of_question = {
        answer.question_id: answer
        for answer in answers
        if answer.gold and parts[answer.id] == "fit"
    }
    return [(units[answer.id], answer) for _, answer in sorted(of_question.items())]
