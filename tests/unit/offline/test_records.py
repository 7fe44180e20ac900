"""Files of a run: a kill costs at most one line, and no file is taken for another run's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from offline.records import (
    FILES,
    Answer,
    Appender,
    Header,
    RecordError,
    read_labelled,
    read_records,
    sha256,
    sort_records,
    write_atomic,
    write_records,
)

MakeAnswer = Callable[..., Answer]


@pytest.mark.parametrize("torn", [1, 7, 200])
def test_a_torn_last_line_is_cut_off_and_its_answer_collected_again(
    tmp_path: Path, make_answer: MakeAnswer, header: Header, torn: int
) -> None:
    """A process that is killed while it writes leaves half a line; nothing else may be lost."""
    path = tmp_path / "answers.jsonl"
    answers = [make_answer(id=f"set/complete/q{i}/0") for i in range(3)]
    with Appender(path, header) as out:
        for answer in answers:
            out.append(answer)
    whole = path.read_bytes()
    path.write_bytes(whole[:-torn])
    with pytest.raises(RecordError, match="ends within a line"):
        read_records(path, Answer)
    with Appender(path, header) as out:
        assert read_records(path, Answer)[1] == answers[:2]
        out.append(answers[2])
    assert path.read_bytes() == whole


def test_a_torn_header_starts_the_file_again(tmp_path: Path, header: Header) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"kind":"ans')
    with Appender(path, header):
        pass
    assert read_records(path, Answer) == (header, [])


@pytest.mark.parametrize("field", ["tokenizer_sha256", "chat_template_sha256", "settings"])
def test_another_run_in_the_same_folder_is_refused_by_field(
    tmp_path: Path, header: Header, field: str
) -> None:
    """Mixing answers of two models or two samplings gives a probe of neither."""
    path = tmp_path / "answers.jsonl"
    with Appender(path, header):
        pass
    other = msgspec.structs.replace(
        header, **{field: {"samples": "10"} if field == "settings" else "x"}
    )
    with pytest.raises(RecordError, match=field):
        Appender(path, other)


def test_line_separators_inside_a_text_do_not_split_a_line(
    tmp_path: Path, make_answer: MakeAnswer, header: Header
) -> None:
    """`str.splitlines` breaks at U+2028, U+0085 and others that answers do hold."""
    answers = [make_answer(text=f"a{mark}b") for mark in ("\u2028", "\u0085", "\x0b", "\r", "\n")]
    write_records(tmp_path / "a.jsonl", header, answers)
    assert read_records(tmp_path / "a.jsonl", Answer)[1] == answers


@pytest.mark.parametrize("line", [b'{"id": 1}', b"\xff\xfe", b"[]", b'{"unknown": 1}', b""])
def test_a_bad_line_is_named(tmp_path: Path, header: Header, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    write_records(path, header, [])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(RecordError, match="line 2"):
        read_records(path, Answer)


def test_records_are_sorted_in_place_and_one_id_twice_is_refused(
    tmp_path: Path, make_answer: MakeAnswer, header: Header
) -> None:
    """A repeated answer would count twice in every figure."""
    answers = [make_answer(id=f"set/ask/q{i}/0") for i in (2, 0, 1)]
    write_records(tmp_path / "a.jsonl", header, answers)
    sort_records(tmp_path / "a.jsonl", Answer)
    assert read_records(tmp_path / "a.jsonl", Answer) == (header, [answers[i] for i in (1, 2, 0)])
    write_records(tmp_path / "a.jsonl", header, [*answers, answers[0]])
    with pytest.raises(RecordError, match="set/ask/q2/0' twice"):
        sort_records(tmp_path / "a.jsonl", Answer)


def test_an_atomic_write_leaves_no_second_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "new" / "a.json", b"1")
    write_atomic(tmp_path / "new" / "a.json", b"2")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.json"]
    assert (tmp_path / "new" / "a.json").read_bytes() == b"2"


def test_labels_of_other_answers_are_refused(
    tmp_path: Path, header: Header, make_answer: MakeAnswer
) -> None:
    """An answer that was asked again has other tokens: the old indices would point into them."""
    answers, labels = tmp_path / "answers.jsonl", tmp_path / "labels.jsonl"
    write_records(answers, header, [make_answer()])
    said = msgspec.structs.replace(
        header, kind="labels", settings={"answers_sha256": sha256(answers)}
    )
    write_records(labels, said, [])
    assert read_labelled(tmp_path).answers == [make_answer()]
    write_records(answers, header, [make_answer(text="Kraków.")])
    with pytest.raises(RecordError, match="is of other answers; run `label` again"):
        read_labelled(tmp_path)


def test_a_folder_and_a_commit_may_hold_the_same_model(header: Header) -> None:
    of_folder = msgspec.structs.replace(header, model_revision=f"{FILES}a")
    of_folder.check_revision("c0ffee", Path("answers.jsonl"))
    with pytest.raises(RecordError, match="other weights"):
        of_folder.check_revision(f"{FILES}b", Path("answers.jsonl"))
