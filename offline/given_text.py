"""Texts that somebody else wrote, with right and wrong facts side by side, as the model reads them.

`--given PATH:KIND[:MOST]` of `extract`. They test the token head where answers of the model cannot:
inside one long text, and on spans that people annotated. Nothing is fitted on them.

facts       texts made of a question file with relations: about one subject, and lists of facts of
            relations that the probe has not seen; in each, about half of the accepted answers give
            way to what another row of the same relation accepts
halueval    annotated spans, against the other sentences of the same response
refchecker  objects of contradicted triplets, against those of entailed ones
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from offline.answer_spans import CharSpan, overlapping, token_offsets
from offline.extract import Item
from offline.questions import Row, json_lines, shuffle_key
from offline.records import Record, RecordError
from offline.shards import Kind
from offline.splits import home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 150  # texts of a kind
MOST_CHARACTERS = 1200  # of a text: longer ones cost more than they tell
SUBJECT_FACTS = 3  # relations, at least, of a subject that a text is made of
LISTED_FACTS = 6  # in a list of facts
WHOLE = 0.95  # a text that is one wrong span has nothing to compare it with


class Fact(Record, frozen=True, kw_only=True):
    """A judged stretch of a text, as indices into its `token_ids`."""

    tokens: tuple[int, ...]
    wrong: bool


class GivenText(Record, frozen=True, kw_only=True):
    """One text; its id is that of its item among the features."""

    id: str
    kind: str  # what the tables call texts of this making
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    facts: tuple[Fact, ...]

    def item(self) -> Item:
        """What `extract` reads; the tokens of no fact are nobody's."""
        kinds = [Kind.UNJUDGED] * len(self.token_ids)
        for fact in self.facts:
            for token in fact.tokens:
                kinds[token] = Kind.WRONG if fact.wrong else Kind.RIGHT
        return Item(self.id, self.prompt_token_ids, self.token_ids, tuple(kinds))


class Span(NamedTuple):
    """A judged stretch of a text, in characters."""

    at: CharSpan
    wrong: bool


class Draft(NamedTuple):
    """A text before it is tokenised."""

    id: str
    kind: str
    prompt: str
    text: str
    spans: tuple[Span, ...]


def given_texts(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> list[GivenText]:
    """The texts of all `PATH:KIND[:MOST]`; `seed` is that of the split, which says what is unseen.

    RecordError names what cannot be used.
    """
    found: list[GivenText] = []
    for source in sources:
        path, kind, most = (*source.split(":"), "", "")[:3]
        if kind not in MAKERS or not (most or "1").isdecimal():
            raise RecordError(f"{source!r} is not PATH:KIND[:MOST] with {', '.join(MAKERS)}")
        by_kind: dict[str, list[Draft]] = defaultdict(list)
        for draft in MAKERS[kind](Path(path), seed):
            if len(draft.text) <= MOST_CHARACTERS and len({span.wrong for span in draft.spans}) > 1:
                by_kind[draft.kind].append(draft)
        if not by_kind:
            raise RecordError(f"{source!r} holds no text with right and wrong facts side by side")
        for drafts in by_kind.values():
            drafts.sort(key=lambda draft: shuffle_key(draft.id))
            found += [_tokenised(draft, tokenizer) for draft in drafts[: int(most or MOST)]]
    return found


def _tokenised(draft: Draft, tokenizer: PreTrainedTokenizerBase) -> GivenText:
    prompt: object = tokenizer.apply_chat_template(
        [{"role": "user", "content": draft.prompt}], add_generation_prompt=True, return_dict=False
    )
    assert isinstance(prompt, list)
    ids = tokenizer.encode(draft.text, add_special_tokens=False)
    offsets = token_offsets(tokenizer, ids)
    facts = [Fact(tokens=overlapping(offsets, [at]), wrong=wrong) for at, wrong in draft.spans]
    return GivenText(
        id=draft.id,
        kind=draft.kind,
        prompt_token_ids=tuple(prompt),
        token_ids=tuple(ids),
        facts=tuple(facts),
    )


def _facts(path: Path, seed: int) -> Iterator[Draft]:
    """Statements that the rows of a question file complete."""
    relations: dict[str, list[Row]] = defaultdict(list)
    subjects: dict[str, dict[str, Row]] = defaultdict(dict)  # subject -> relation -> row
    rows = sorted((row for _, row in json_lines(path, Row)), key=lambda row: shuffle_key(row.id))
    for row in rows:
        named = re.fullmatch(rf"The {re.escape(row.group)} (.+) is", row.question)
        if named and row.answers:
            relations[row.group].append(row)
            subjects[named[1]].setdefault(row.group, row)
    for subject, known in subjects.items():
        if len(known) >= SUBJECT_FACTS:
            yield _composed(
                f"{path.stem}/{subject}", "facts of one subject, relations partly seen",
                f"Tell me about {subject}.", list(known.values()), relations,
            )  # fmt: skip
    unseen = [
        row
        for group, rows in relations.items()
        if home(f"{path.stem}/{group}", seed) == "test"
        for row in rows
    ]
    unseen.sort(key=lambda row: shuffle_key(row.id))
    for i in range(0, len(unseen) - LISTED_FACTS + 1, LISTED_FACTS):
        yield _composed(
            f"{path.stem}/list {i}", "lists of facts, unseen relations",
            f"Name {LISTED_FACTS} facts.", unseen[i : i + LISTED_FACTS], relations,
        )  # fmt: skip


def _composed(
    id: str, kind: str, prompt: str, rows: Sequence[Row], relations: dict[str, list[Row]]
) -> Draft:
    """One sentence per row. A wrong answer is as common among wrong ones as among right ones: it is
    drawn row by row, or rarity alone would tell them apart."""
    text, spans = "", []
    for row in rows:
        said = row.answers[0]
        others = [other.answers[0] for other in relations[row.group]]
        others = [other for other in others if other not in row.answers]
        draw = int(shuffle_key(f"{id}/{row.id}"), 16)
        wrong = bool(draw % 2 and others)
        if wrong:
            said = others[draw // 2 % len(others)]
        text += f"{' ' if text else ''}{row.question} "
        spans.append(Span((len(text), len(text) + len(said)), wrong))
        text += f"{said}."
    return Draft(id, kind, prompt, text, tuple(spans))


class _Offsets(msgspec.Struct, frozen=True):
    start: int
    end: int


class _HaluEval(msgspec.Struct, frozen=True):
    id: str
    question: str
    response: str
    spans: tuple[_Offsets, ...]
    spans_dropped: int = 0


def _halueval(path: Path, seed: int) -> Iterator[Draft]:
    """Responses of ChatGPT whose wrong spans people marked; all of them were found in the text."""
    for _, row in json_lines(path, _HaluEval):
        wrong = [(span.start, span.end) for span in row.spans]
        marked = sum(stop - start for start, stop in wrong)
        if not wrong or row.spans_dropped or marked > WHOLE * len(row.response):
            continue
        sentences = [found.span() for found in re.finditer(r"[^.!?\n]*\w[^.!?\n]*", row.response)]
        right = [s for s in sentences if all(s[1] <= w[0] or w[1] <= s[0] for w in wrong)]
        spans = (*(Span(at, True) for at in wrong), *(Span(at, False) for at in right))
        kind = "HaluEval, marked spans against other sentences"
        yield Draft(row.id, kind, row.question, row.response, spans)


class _Triplet(msgspec.Struct, frozen=True):
    triplet: tuple[str, str, str]
    human_label: str


class _RefChecker(msgspec.Struct, frozen=True):
    id: str
    response: str
    triplets: tuple[_Triplet, ...]
    question: str | None = None


def _refchecker(path: Path, seed: int) -> Iterator[Draft]:
    """Responses of seven models: objects of triplets that stand in them once, word for word."""
    labels = {"Contradiction": True, "Entailment": False}
    for _, row in json_lines(path, _RefChecker):
        found: dict[CharSpan, set[bool]] = defaultdict(set)
        for triplet in row.triplets:
            if triplet.human_label in labels:
                words = rf"(?<!\w){re.escape(triplet.triplet[2])}(?!\w)"
                places = [m.span() for m in re.finditer(words, row.response, re.IGNORECASE)]
                if len(places) == 1 and places[0][0] < places[0][1]:
                    found[places[0]].add(labels[triplet.human_label])
        spans = tuple(Span(at, *said) for at, said in sorted(found.items()) if len(said) == 1)
        if row.question and not _overlap([span.at for span in spans]):
            kind = "RefChecker, contradicted against entailed objects"
            yield Draft(row.id, kind, row.question, row.response, spans)


def _overlap(spans: Sequence[CharSpan]) -> bool:
    return any(before[1] > after[0] for before, after in itertools.pairwise(spans))


MAKERS: dict[str, Callable[[Path, int], Iterator[Draft]]] = {
    "facts": _facts,
    "halueval": _halueval,
    "refchecker": _refchecker,
}
