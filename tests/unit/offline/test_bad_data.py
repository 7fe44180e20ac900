"""Bad data gives one sentence that names the row, leaves what was done, and fails; from the shell.

The bug that each prevents: a traceback after an hour, a row that is skipped in silence, a file that
a half-read input has overwritten.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from transformers import PreTrainedTokenizerFast

from offline import __main__ as command
from offline.questions import Source, read_questions
from offline.records import Answer, Appender, Header, RecordError, read_records, write_records

MakeAnswer = Callable[..., Answer]

GOOD = '{"id": "a", "question": "Where is it?", "answers": ["Rome"]}\n'


def _offline(*arguments: str) -> str:
    """What `python -m offline` says when it fails; in this process, which has imported it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["offline", *arguments])
        with pytest.raises(SystemExit) as ended:
            command.main()
    assert isinstance(ended.value.code, str), "it ended without a sentence"  # so status 1
    return ended.value.code


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b'{"id": "b", "question": "Where?"}', "line 2 ('b'): needs a question with at least one"),
        (b'{"id": "b", "question": "Where?", "answers": []}', "line 2 ('b'): needs a question"),
        (b'{"id": "b", "question": "?", "answers": null}', "line 2: Expected `array`, got `null`"),
        (
            b'{"id": "b", "question": "?", "answers": ["x", " "]}',
            "line 2 ('b'): an accepted answer",
        ),
        (b'{"id": 7, "question": "?", "answers": ["x"]}', "line 2: Expected `str`, got `int`"),
        (b'{"id": "a", "question": "?", "answers": ["x"]}', "line 2: id 'a' stands there twice"),
        (b'{"id": "b", "question": "' + b"x" * 10_000_000 + b'"}', "line 2: 10000027 bytes, more"),
        ('{"id": "b", "question": "Königsberg?"}'.encode("latin-1"), "line 2: "),
        (b'{"id": "b", "question": "\\ud800", "answers": ["x"]}', "line 2: "),
        (b'{"id": "b", "question": "Wh', "line 2: Input data was truncated"),
        (b"not json", "line 2: JSON is malformed"),
    ],
    ids=lambda value: value[:40].decode("latin-1") if isinstance(value, bytes) else "",
)
def test_a_bad_row_of_questions_is_named_and_the_answers_stay(
    tmp_path: Path, make_answer: MakeAnswer, header: Header, body: bytes, sentence: str
) -> None:
    answers = tmp_path / "answers.jsonl"
    write_records(answers, header, [make_answer()])
    before = answers.read_bytes()
    path = tmp_path / "q.jsonl"
    path.write_bytes(GOOD.encode() + body + b"\n")
    said = _offline("collect", "m", "--out", str(tmp_path), "--questions", f"{path}:ask")
    assert said.startswith(f"error: {path}, {sentence}")
    assert len(said) < 400
    assert answers.read_bytes() == before


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (("\ufeff" + GOOD).encode(), "line 1: starts with the byte order mark of UTF-8"),
        (GOOD.encode("utf-16"), "line 1: starts with the byte order mark of UTF-16"),
        (b"\n \n", "holds no question"),
        (b'{"id": "p", "prompt": "Tell a story"}\n', "row 'p': a prompt is asked as it is"),
    ],
)
def test_a_bad_file_of_questions_is_named(tmp_path: Path, body: bytes, sentence: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(body)
    said = _offline("collect", "m", "--out", str(tmp_path), "--questions", f"{path}:ask")
    assert str(path) in said
    assert sentence in said


def test_one_id_in_two_files_of_one_name_is_named(tmp_path: Path) -> None:
    """Their answers could not be told apart."""
    sources = []
    for folder in ("one", "two"):
        path = tmp_path / folder / "q.jsonl"
        path.parent.mkdir()
        path.write_text(GOOD)
        sources += ["--questions", f"{path}:ask"]
    said = _offline("collect", "m", "--out", str(tmp_path / "run"), *sources)
    assert said == "error: question 'q/ask/a' is asked twice; give each source once"


def test_a_line_separator_inside_a_row_is_text(tmp_path: Path) -> None:
    """U+2028 ends a line for `str.splitlines`: the row would be two bad ones."""
    path = tmp_path / "q.jsonl"
    row = {"id": "a", "question": "Where\u2028is\u0085it?", "answers": ["Rome"]}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_questions(Source.parse(f"{path}:ask"))[0].question == row["question"]


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda body: body[:-20], "ends within a line; run the verb that writes it again"),
        (lambda body: body.replace(b'"text"', b'"txet"', 1), "line 2: "),
        (lambda body: body.replace(b"Warsaw.", b"Wars\xe4w.", 1), "line 2: "),
        (lambda body: b"", "is empty: its header is missing"),
    ],
)
def test_a_damaged_file_of_answers_is_named_by_the_next_verb(
    tmp_path: Path,
    make_answer: MakeAnswer,
    header: Header,
    tokenizer: PreTrainedTokenizerFast,
    break_it: Callable[[bytes], bytes],
    sentence: str,
) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    answers = tmp_path / "answers.jsonl"
    write_records(answers, header, [make_answer()])
    answers.write_bytes(break_it(answers.read_bytes()))
    damaged = answers.read_bytes()
    said = _offline("label", str(tmp_path / "model"), "--out", str(tmp_path))
    assert str(answers) in said
    assert sentence in said
    assert answers.read_bytes() == damaged
    assert not (tmp_path / "labels.jsonl").exists()


FILL = """
import resource, signal, sys
from pathlib import Path
import msgspec
from offline.records import Answer, Appender, Header
path = Path(sys.argv[1])
header = msgspec.json.decode(sys.argv[2], type=Header)
answer = msgspec.json.decode(sys.argv[3], type=Answer)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Appender(path, header) as out:
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 1000, resource.RLIM_INFINITY))
    for i in range(100):
        out.append(msgspec.structs.replace(answer, id=f"set/ask/q{i}/0"))
"""


def test_a_full_disk_costs_only_the_answer_that_did_not_fit(
    tmp_path: Path, make_answer: MakeAnswer, header: Header
) -> None:
    """The system takes a part of the line and says so only in a number; lines written after it
    would be joined to that part."""
    path = tmp_path / "answers.jsonl"
    texts = [msgspec.json.encode(record).decode() for record in (header, make_answer())]
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(path), *texts], capture_output=True, text=True, check=False
    )
    assert "is the disk full?" in done.stderr
    with pytest.raises(RecordError, match="ends within a line"):
        read_records(path, Answer)
    with Appender(path, header) as out:
        kept = read_records(path, Answer)[1]
        out.append(make_answer(id="set/ask/new/0"))
    assert [answer.id for answer in kept] == [f"set/ask/q{i}/0" for i in range(len(kept))]
    assert len(read_records(path, Answer)[1]) == len(kept) + 1
