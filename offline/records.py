"""What the verbs hand to each other: JSON Lines files that open with a header and only grow.

A line is appended in one write and synced, so a kill costs at most the line that was being written;
that torn tail is cut off when the file is opened again. Lines are split at "\\n" alone: texts may
hold U+2028 or U+0085, which `str.splitlines` would break. Knows nothing of models or of HTTP.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeVar

import msgspec

from probes.cett import FORMULA_VERSION
from probes.errors import HNeuronsError

FILES = "files:"  # before a digest of the files of a model folder
LIBRARIES = ("hneurons", "torch", "transformers", "numpy", "scikit-learn", "skglm")

Verdict = Literal["right", "wrong", "abstained", "unjudged", "mixed", "ordinary"]


class RecordError(HNeuronsError):
    """A file of a run cannot be read or does not belong to this run; names file and line."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Strict and immutable; an unknown key or a wrong type is refused with its line."""


class Header(Record, frozen=True, kw_only=True):
    """First line of every file: what made it. A verb refuses input made with another model."""

    kind: Literal["answers", "labels", "given", "replies", "sweep"]
    model_id: str  # for people, not compared: a folder and a hub id may hold the same model
    model_revision: str = ""  # commit of a hub id, or FILES and a digest of a folder's weights
    tokenizer_sha256: str
    chat_template_sha256: str
    formula_version: int = FORMULA_VERSION
    settings: dict[str, str]  # sampling, judge, agreement rule, digests of the inputs
    libraries: dict[str, str]  # for people, not compared

    def check_same_run(self, other: Header, path: Path) -> None:
        """RecordError unless `path`, which opens with `other`, goes on with the same run."""
        for field in (
            "kind",
            "tokenizer_sha256",
            "chat_template_sha256",
            "formula_version",
            "settings",
        ):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise RecordError(
                    f"{path} was made with {field} {theirs!r}, this run has {mine!r}; "
                    f"choose another --out folder or repeat the run with the old settings"
                )
        other.check_revision(self.model_revision, path)

    def check_revision(self, here: str, path: Path) -> None:
        """RecordError when `path`, which opens with this header, was made with another commit than
        `here`, or with other weights. A commit and a folder may hold the same model."""
        there = self.model_revision
        if there == here or not (there and here):
            return
        if there.startswith(FILES) != here.startswith(FILES):
            return
        if here.startswith(FILES):
            raise RecordError(
                f"{path} was made with other weights than this folder of {self.model_id} holds "
                f"({there} there, {here} here); give the model that answered, or another --out"
            )
        raise RecordError(
            f"{path} was made with revision {there} of {self.model_id}, not with {here}; give "
            f"--revision {there} or choose another --out folder"
        )


class Answer(Record, frozen=True, kw_only=True):
    """One sampled answer. Token ids are those that the server wrote; they are never made again."""

    id: str  # "<source>/<style>/<question id>/<sample>", unique in its file
    source: str  # stem of the question file
    style: str  # how the question was put (offline/questions.py)
    group: str  # relation, site, kind of prompt: balance and splits go by it
    question: str  # as in the file
    prompt: str  # as sent
    gold: tuple[str, ...]  # accepted answers; empty for an ordinary prompt
    split: str  # "" or the part that the question file itself assigns
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]  # end token included when there was one
    text: str
    finish_reason: str

    @property
    def question_id(self) -> str:
        return self.id.rsplit("/", 1)[0]


class Label(Record, frozen=True, kw_only=True):
    """What is known about one answer, and which of its tokens carry the claim.

    A right or wrong answer without tokens counts as a whole only: no words of it make the claim.

    span    character offsets `[start, stop)` into the text: the words that answer the question
    tokens  indices into `token_ids` of the span's tokens
    others  indices of the tokens around it which claim nothing (scaffold, or ordinary prose)
    """

    id: str
    verdict: Verdict
    span: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    others: tuple[int, ...]
    dropped: str  # "" or why this answer is not used

    @property
    def hallucinated(self) -> bool:
        """Only for a verdict of right or wrong."""
        if self.verdict not in ("right", "wrong"):
            raise ValueError(f"{self.id} is {self.verdict}: neither faithful nor hallucinated")
        return self.verdict == "wrong"


class Reply(Record, frozen=True, kw_only=True):
    """What a model said when it was asked about an answer, word for word."""

    id: str  # digest of what was asked: a question that recurs is asked once
    text: str


class SweepAnswer(Record, frozen=True, kw_only=True):
    """What the model said to one item of a behaviour set under one alpha on one set of neurons."""

    id: str  # "<behaviour set>/<item>/<neurons>/<alpha>"
    text: str
    tokens: int  # end token included
    finish_reason: str


T = TypeVar("T", bound=Record)
Keyed = TypeVar("Keyed", Answer, Label, Reply, SweepAnswer)


def versions() -> dict[str, str]:
    """Installed versions of the libraries that a fit depends on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path) -> bytes:
    """The file of an earlier verb; RecordError when that verb has not run."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise RecordError(f"{exc}; run the verb that writes {path.name} first") from exc


def read_record(path: Path, kind: type[T]) -> T:
    """The one record of an earlier verb's file; RecordError when another version wrote it."""
    try:
        return msgspec.json.decode(read_bytes(path), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RecordError(f"{path}: {exc}; run the verb that writes it again") from exc


def read_records(path: Path, kind: type[T]) -> tuple[Header, list[T]]:
    """Header and records of a finished file; a torn tail or a bad line is a RecordError."""
    lines = read_bytes(path).split(b"\n")
    if lines.pop():
        raise RecordError(f"{path} ends within a line; run the verb that writes it again")
    if not lines:
        raise RecordError(f"{path} is empty: its header is missing")
    header = _decode(lines[0], Header, path, 1)
    return header, [_decode(line, kind, path, i) for i, line in enumerate(lines[1:], start=2)]


class Labelled(NamedTuple):
    """answers.jsonl and labels.jsonl of a run, which belong together."""

    header: Header  # of the answers
    answers: list[Answer]
    settings: dict[str, str]  # of the labels
    labels: list[Label]


def read_labelled(run: Path) -> Labelled:
    """RecordError when the labels are of other answers than `run` holds now: their tokens would
    point into texts that nobody has judged."""
    header, answers = read_records(run / "answers.jsonl", Answer)
    said, labels = read_records(run / "labels.jsonl", Label)
    if said.settings.get("answers_sha256") != sha256(run / "answers.jsonl"):
        raise RecordError(f"{run / 'labels.jsonl'} is of other answers; run `label` again")
    return Labelled(header, answers, said.settings, labels)


def sort_records(path: Path, kind: type[Keyed]) -> None:
    """Put the records of a finished file into the order of their ids, atomically.

    They were appended as they came; sorted, the file is the same however often its verb was killed,
    and so is all that is made of it. RecordError when two records have one id.
    """
    header, records = read_records(path, kind)
    ordered = sorted(records, key=lambda record: record.id)
    for before, after in itertools.pairwise(ordered):
        if before.id == after.id:
            raise RecordError(f"{path} holds {after.id!r} twice; delete one of the two lines")
    if ordered != records:
        write_records(path, header, ordered)


def write_records(path: Path, header: Header, records: Sequence[Record]) -> None:
    """A whole file at once, atomically."""
    body = b"".join(msgspec.json.encode(record) + b"\n" for record in (header, *records))
    write_atomic(path, body)


def write_atomic(path: Path, body: bytes) -> None:
    """`path` holds either its old content or `body`, also after a power cut."""
    with replacing(path) as temporary:
        temporary.write_bytes(body)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write into, which takes the place of `path` when `with` ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


class Appender:
    """A growing file: `with Appender(path, header) as out: out.append(record)`."""

    def __init__(self, path: Path, header: Header) -> None:
        """Start `path`, or go on with it when its header says that it is of the same run."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_tail(path)
        if path.exists() and path.stat().st_size:
            with path.open("rb") as file:
                found = _decode(file.readline().rstrip(b"\n"), Header, path, 1)
            header.check_same_run(found, path)
        else:
            write_records(path, header, ())
        self._file = path.open("ab", buffering=0)

    def append(self, record: Record) -> None:
        """One line, one write, on disk when this returns; RecordError when the disk took a part."""
        line = msgspec.json.encode(record) + b"\n"
        if self._file.write(line) != len(line):
            raise RecordError(f"only part of a line went into {self.path}: is the disk full?")
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def _cut_torn_tail(path: Path) -> None:
    if not path.exists():
        return
    body = path.read_bytes()
    whole = body.rfind(b"\n") + 1
    if whole < len(body):
        os.truncate(path, whole)


def _decode(line: bytes, kind: type[T], path: Path, number: int) -> T:
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RecordError(f"{path}, line {number}: {exc}") from exc
