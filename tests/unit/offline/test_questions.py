"""Question files: rows are chosen reproducibly, bad data is named by its row."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from offline.questions import Source, check_unique, read_questions
from offline.records import RecordError


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    rows: list[dict[str, object]] = [
        {
            "id": f"q{i}",
            "question": f"The capital of X{i} is",
            "answers": ["Y"],
            "group": f"g{i % 2}",
        }
        for i in range(20)
    ]
    return _write(tmp_path / "wiki.jsonl", rows)


def test_two_styles_ask_different_rows_of_every_group(wiki: Path) -> None:
    """The same question in two styles would count twice; SKIP keeps the styles apart."""
    first = read_questions(Source.parse(f"{wiki}:complete:4"))
    second = read_questions(Source.parse(f"{wiki}:ask:4:4"))
    assert len(first) == len(second) == 8
    assert not {q.question for q in first} & {q.question for q in second}
    check_unique([*first, *second])


def test_kinds_of_prompts_are_groups(tmp_path: Path) -> None:
    """So many rows of each, not in all: one kind would be most of what is taken for prose."""
    rows: list[dict[str, object]] = [
        {"id": f"p{i}", "prompt": f"Tell {i}", "kind": f"k{i % 3}"} for i in range(12)
    ]
    path = _write(tmp_path / "prompts.jsonl", rows)
    found = read_questions(Source.parse(f"{path}:ordinary:2"))
    assert Counter(question.group for question in found) == {"k0": 2, "k1": 2, "k2": 2}


def test_the_choice_does_not_depend_on_the_order_of_the_file(wiki: Path) -> None:
    rows = wiki.read_text(encoding="utf-8").splitlines(keepends=True)
    before = read_questions(Source.parse(f"{wiki}:complete:3"))
    wiki.write_text("".join(rows[::-1]), encoding="utf-8")
    assert read_questions(Source.parse(f"{wiki}:complete:3")) == before


def test_a_statement_prefix_becomes_a_question_where_its_form_allows(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"id": "a", "question": "The capital of Poland is", "answers": ["Warsaw"]},
        {"id": "b", "question": "Ottawa is located in", "answers": ["Ontario"]},
        {"id": "c", "question": "Who wrote Hamlet?", "answers": ["Shakespeare"]},
    ]
    path = _write(tmp_path / "s.jsonl", rows)
    asked = {q.id.rsplit("/")[-1]: q.prompt for q in read_questions(Source.parse(f"{path}:ask"))}
    assert asked == {
        "a": "What is the capital of Poland?",
        "b": "Finish this sentence: Ottawa is located in",
        "c": "Who wrote Hamlet?",
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a", "question": "Q?"}, "at least one answer"),
        ({"id": "a", "question": None, "answers": []}, "line 2"),
        ({"id": "a", "prompt": "P", "question": "Q?", "answers": ["x"]}, "or a prompt"),
        ({"id": "first", "question": "Q?", "answers": ["x"]}, "stands there twice"),
        ({"question": "Q?", "answers": ["x"]}, "line 2"),
        ({"id": "a", "prompt": "P", "split": "dev"}, "split 'dev' is not one of fit, test; leave"),
        ({"id": "a", "question": "Q" * 2_000_000, "answers": ["x"]}, "bytes, more than"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(
    tmp_path: Path, row: dict[str, object], message: str
) -> None:
    good: dict[str, object] = {"id": "first", "question": "Q?", "answers": ["x"]}
    path = _write(tmp_path / "bad.jsonl", [good, row])
    with pytest.raises(RecordError, match=message):
        read_questions(Source.parse(f"{path}:ask"))


def test_wrong_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"id": "a", "question": "Königsberg?", "answers": ["x"]}\n'.encode("latin-1"))
    with pytest.raises(RecordError, match="line 1"):
        read_questions(Source.parse(f"{path}:ask"))


@pytest.mark.parametrize("text", ["f.jsonl:guess", "f.jsonl:ask:x", "f.jsonl:ask:1:-2"])
def test_a_bad_source_is_refused(text: str) -> None:
    with pytest.raises(RecordError, match=r"f\.jsonl"):
        Source.parse(text)


def test_the_shipped_ordinary_prompts_are_whole_and_split(repository: Path) -> None:
    """Twenty of them judge the shipped probe: none may also be fitted or calibrated on."""
    prompts = read_questions(
        Source.parse(f"{repository / 'offline/data/ordinary_prompts.jsonl'}:ordinary")
    )
    splits = [prompt.split for prompt in prompts]
    assert (splits.count("fit"), splits.count("test")) == (263, 222)
    assert len({prompt.prompt.casefold() for prompt in prompts}) == len(prompts)
