"""The rules against a reader: 432 answers, judged one by one; tests/data/README.md says by whom.

Run with -s to see the table. The bounds stand just below what was reached, so that a change that
costs agreement is seen; what no rule can know ("PhD" for "doctorate", Paris in Texas) is in the set
and counts against them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from offline.answer_spans import CharSpan, locate_right, locate_wrong
from offline.judge import Case, by_alias, usable_aliases
from offline.words import words


class Row(msgspec.Struct, frozen=True):
    picked: str
    id: str
    question: str
    answers: tuple[str, ...]
    text: str
    verdict: str
    claim: tuple[int, int] | None

    @property
    def case(self) -> Case:
        return Case(self.id, self.question, self.answers, self.text)


@pytest.fixture(scope="module")
def rows(repository: Path) -> list[Row]:
    path = repository / "tests" / "data" / "judged_answers.jsonl"
    return [msgspec.json.decode(line, type=Row) for line in path.read_bytes().split(b"\n") if line]


def test_the_set_is_large_varied_and_whole(rows: list[Row]) -> None:
    assert len(rows) >= 400
    assert len({row.id for row in rows}) == len(rows)
    assert len([row for row in rows if row.claim]) >= 300
    for row in rows:
        assert row.verdict in ("right", "wrong", "declined")
        assert not row.claim or row.text[slice(*row.claim)].strip(" .,") != ""
    assert json.dumps([row.text for row in rows if row.picked == "invented"]).count("\\u") > 20


@pytest.mark.parametrize(
    ("picked", "decided", "agreed"),
    [("random", 0.97, 1.0), ("fresh", 0.95, 1.0), ("chosen", 0.88, 0.97), ("invented", 0.70, 0.81)],
)
def test_the_alias_rule_agrees_with_a_reader(
    rows: list[Row], picked: str, decided: float, agreed: float
) -> None:
    """Of the answers on which the rule decides; on the others it says why it does not."""
    chosen = [row for row in rows if row.picked == picked]
    said = [by_alias(row.case).verdict.replace("abstained", "declined") for row in chosen]
    pairs = [pair for pair in zip(chosen, said, strict=True) if pair[1] != "unjudged"]
    right = sum(row.verdict == verdict for row, verdict in pairs)
    table = Counter((row.verdict, verdict) for row, verdict in zip(chosen, said, strict=True))
    counts = "; ".join(f"{pair} {count}" for pair, count in sorted(table.items()))
    print(f"\n{picked}: of {len(chosen)} {len(pairs)} decided, {right} as read: {counts}")  # noqa: T201
    assert len(pairs) / len(chosen) >= decided
    assert right / len(pairs) >= agreed


@pytest.mark.parametrize(
    ("picked", "verdict", "same"),
    [
        ("random", "right", 1.0), ("random", "wrong", 0.92),
        ("fresh", "right", 1.0), ("fresh", "wrong", 0.80),
        ("chosen", "right", 0.95), ("chosen", "wrong", 0.73),
        ("invented", "right", 0.89), ("invented", "wrong", 0.79),
    ],
)  # fmt: skip
def test_the_claim_is_found_where_a_reader_finds_it(
    rows: list[Row], picked: str, verdict: str, same: float
) -> None:
    """The same words, stop words apart; none where the reader found none."""
    chosen = [row for row in rows if row.picked == picked and row.verdict == verdict]
    outcome = Counter(_outcome(row) for row in chosen)
    print(f"\n{picked}, {verdict}: {len(chosen)} read, {dict(outcome)}")  # noqa: T201
    assert outcome["same"] / len(chosen) >= same


def _outcome(row: Row) -> str:
    aliases = usable_aliases(row.answers, row.question)
    found = (row.verdict == "right" and locate_right(row.text, aliases)) or locate_wrong(
        row.text, row.question, row.answers
    )
    got = _content(row.text, found.spans if found else ())
    wanted = _content(row.text, [row.claim] if row.claim else ())
    if got == wanted:
        return "same"
    return "other words" if got and wanted else ("none for a claim" if wanted else "claim for none")


def _content(text: str, spans: Sequence[CharSpan]) -> list[int]:
    return [
        word.start
        for word in words(text)
        if not word.is_stop
        and any(start < word.stop and word.start < stop for start, stop in spans)
    ]
