"""Question files, and how a question is put to the model.

A row needs `id` and either `question` + `answers` (a question that can be answered wrongly) or
`prompt` (an ordinary prompt: stories, tips, small talk). `group` is optional, and so is the `split`
of a prompt, which says its part; the part of a question is always drawn.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from offline.records import Answer, RecordError
from offline.splits import OWN_SPLITS

MAX_ROW_BYTES = 1_000_000
T = TypeVar("T", bound=msgspec.Struct)
_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a question file; keys beyond these are other people's and are left alone."""

    id: str
    question: str = ""
    answers: tuple[str, ...] = ()
    prompt: str = ""
    group: str = ""
    kind: str = ""
    split: str = ""


class Source(NamedTuple):
    """`PATH:STYLE[:PER_GROUP[:SKIP]]` of the command line: which rows are asked, and how."""

    path: Path
    style: str
    per_group: int  # at most so many rows of each group; 0: all
    skip: int  # leave out so many rows of each group first: they belong to another style

    @classmethod
    def parse(cls, text: str) -> Source:
        path, style, per_group, skip = (*text.split(":"), "", "", "")[:4]
        style = style or "ask"
        if style not in STYLES:
            raise RecordError(f"{text!r}: style {style!r} is not one of {', '.join(STYLES)}")
        if not all(number.isdecimal() for number in (per_group or "0", skip or "0")):
            raise RecordError(
                f"{text!r}: expected PATH:STYLE[:PER_GROUP[:SKIP]] with whole numbers"
            )
        return cls(Path(path), style, int(per_group or 0), int(skip or 0))


class Question(NamedTuple):
    """A row, ready to be sent."""

    id: str
    source: str
    style: str
    group: str
    question: str
    prompt: str
    gold: tuple[str, ...]
    split: str
    max_tokens: int


def _complete(text: str) -> str:
    return f"Complete the sentence: {text} ... Respond with the missing words only."


def _answer_only(text: str) -> str:
    """The paper's suffix."""
    question = text if text.rstrip().endswith("?") else f"{text}?"
    return f"{question} Respond with the answer only, without any explanation."


def _ask(text: str) -> str:
    """As people ask in a chat; a statement prefix becomes a question where its form allows it."""
    prefix = re.fullmatch(r"The (.+) is", text)
    if prefix:
        return f"What is the {prefix[1]}?"
    return text if text.rstrip().endswith("?") else f"Finish this sentence: {text}"


def _as_is(text: str) -> str:
    return text


ORDINARY = "ordinary"
STYLES: dict[str, tuple[Callable[[str], str], int]] = {
    # name: (how the prompt is made, most tokens of the answer)
    "complete": (_complete, 24),
    "answer_only": (_answer_only, 24),
    "ask": (_ask, 40),
    ORDINARY: (_as_is, 160),
}


def read_questions(source: Source) -> list[Question]:
    """The chosen rows in an order that does not depend on the file's; RecordError names the row."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(_read_rows(source.path), key=lambda row: shuffle_key(row.id)):
        groups[row.group or row.kind].append(row)
    stop = source.skip + source.per_group if source.per_group else None
    chosen = [row for rows in groups.values() for row in rows[source.skip : stop]]
    for row in chosen:
        if row.prompt and source.style != ORDINARY:
            raise RecordError(
                f"{source.path}, row {row.id!r}: a prompt is asked as it is, in the style "
                f"{ORDINARY}; {source.style} is for questions"
            )
    make_prompt, max_tokens = STYLES[source.style]
    name = source.path.stem
    return [
        Question(
            id=f"{name}/{source.style}/{row.id}",
            source=name,
            style=source.style,
            group=row.group or row.kind,
            question=row.question,
            prompt=make_prompt(row.question or row.prompt),
            gold=row.answers,
            split=row.split,
            max_tokens=max_tokens,
        )
        for row in sorted(chosen, key=lambda row: shuffle_key(row.id))
    ]


def question_of(answer: Answer) -> Question:
    """The question of an answer, to be asked again."""
    return Question(
        id=answer.question_id,
        source=answer.source,
        style=answer.style,
        group=answer.group,
        question=answer.question,
        prompt=answer.prompt,
        gold=answer.gold,
        split=answer.split,
        max_tokens=STYLES[answer.style][1],
    )


def check_unique(questions: Sequence[Question]) -> None:
    """RecordError when one id is asked twice: its answers could not be told apart."""
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise RecordError(f"question {question.id!r} is asked twice; give each source once")
        seen.add(question.id)


def _read_rows(path: Path) -> list[Row]:
    rows: list[Row] = []
    seen: set[str] = set()
    for number, row in json_lines(path, Row):
        if bool(row.prompt) == bool(row.question and row.answers):
            raise RecordError(
                f"{path}, line {number} ({row.id!r}): needs a question with at least one answer, "
                f"or a prompt"
            )
        if not all(answer.strip() for answer in row.answers):
            raise RecordError(f"{path}, line {number} ({row.id!r}): an accepted answer is empty")
        if row.prompt and row.split not in ("", *OWN_SPLITS):
            raise RecordError(
                f"{path}, line {number} ({row.id!r}): split {row.split!r} is not one of "
                f"{', '.join(OWN_SPLITS)}; leave it out to have one drawn"
            )
        if row.id in seen:
            raise RecordError(f"{path}, line {number}: id {row.id!r} stands there twice")
        seen.add(row.id)
        rows.append(row)
    if not rows:
        raise RecordError(f"{path} holds no question")
    return rows


def json_lines(path: Path, kind: type[T]) -> Iterator[tuple[int, T]]:
    """`(line number, row)` of somebody's JSON Lines file; RecordError names the line."""
    try:
        body = path.read_bytes()
    except OSError as exc:
        raise RecordError(f"cannot read the questions: {exc}") from exc
    for mark, name in _MARKS:
        if body.startswith(mark):
            raise RecordError(
                f"{path}, line 1: starts with the byte order mark of {name}; save it as UTF-8 "
                f"without one"
            )
    for number, line in enumerate(body.split(b"\n"), start=1):
        if not line.strip():
            continue
        if len(line) > MAX_ROW_BYTES:
            raise RecordError(
                f"{path}, line {number}: {len(line)} bytes, more than {MAX_ROW_BYTES}; "
                f"is this a JSON Lines file?"
            )
        try:
            row = msgspec.json.decode(line, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise RecordError(f"{path}, line {number}: {exc}") from exc
        yield number, row


def shuffle_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
