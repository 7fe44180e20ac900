"""Collecting over HTTP: from a scripted server on a loopback port, refusals and all."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from offline.chat_client import ChatError
from offline.child_server import ChildServerError, _wait_until_ready, child_server
from offline.collect import (
    PAPER,
    Ask,
    CollectError,
    Sampling,
    answers_header,
    ask_all,
    collect,
    missing,
    sampling,
)
from offline.models import LoadedTokenizer
from offline.questions import Question
from offline.records import Answer, Header, RecordError, read_records, sort_records

Reply = tuple[int, dict[str, str], dict[str, Any]]


class ScriptedServer:
    """Answers every question; `refuse(body, attempt)` may say something else first."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.attempts: Counter[str] = Counter()
        self.open_now = 0
        self.most_open = 0
        self.refuse: Callable[[dict[str, Any], int], Reply | None] = lambda body, attempt: None
        self.gate = threading.Lock()
        self.url = ""
        self.served = ["served-name"]
        self.owner: dict[str, str] = {}

    def answer(self, body: dict[str, Any]) -> Reply:
        prompt = body["messages"][0]["content"]
        with self.gate:
            self.bodies.append(body)
            self.attempts[prompt] += 1
            attempt = self.attempts[prompt]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": f"It is {body['seed']}."},
            "finish_reason": "stop",
            "token_ids": [5, 6, 2],
        }
        return self.refuse(body, attempt) or (
            200, {}, {"id": "x", "prompt_token_ids": [1, 2, 3], "choices": [choice]}
        )  # fmt: skip


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    script = ScriptedServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {}, {"data": [{"id": n} | script.owner for n in script.served]})

        def do_POST(self) -> None:
            with script.gate:
                script.open_now += 1
                script.most_open = max(script.most_open, script.open_now)
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            reply = script.answer(body)
            with script.gate:
                script.open_now -= 1
            self._send(*reply)

        def _send(self, status: int, headers: dict[str, str], body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield script
    server.shutdown()
    server.server_close()


def _questions(n: int) -> list[Question]:
    return [
        Question(
            id=f"set/ask/q{i}", source="set", style="ask", group="g", question=f"Q{i}?",
            prompt=f"Q{i}?", gold=("x",), split="", max_tokens=24,
        )
        for i in range(n)
    ]  # fmt: skip


def _header(sampling: Sampling) -> Header:
    tokenizer = LoadedTokenizer(None, "t", "c")  # type: ignore[arg-type]  # names a run, no more
    return answers_header("m", tokenizer=tokenizer, sampling=sampling, libraries={})


async def _collect(
    server: ScriptedServer,
    path: Path,
    questions: list[Question],
    *,
    sampling: Sampling | None = None,
    in_flight: int = 4,
) -> int:
    """Ask what is missing; returns how many answers that were."""
    sampling = sampling or Sampling()
    header = _header(sampling)
    asks = missing(questions, path, header=header, samples=sampling.samples)
    await collect(
        asks, path, base_url=server.url, header=header, sampling=sampling, in_flight=in_flight
    )
    return len(asks)


async def test_ids_and_text_are_kept_as_the_server_gave_them(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    """Trap 7: ids that are made again from the text are others; they are asked for and kept."""
    assert await _collect(scripted, tmp_path / "a.jsonl", _questions(1)) == 1
    _, (answer,) = read_records(tmp_path / "a.jsonl", Answer)
    assert (answer.prompt_token_ids, answer.token_ids) == ((1, 2, 3), (5, 6, 2))
    assert answer.text.startswith("It is ")
    body = scripted.bodies[0]
    assert body["return_token_ids"] is True
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("served-name", 0.0, 24)


async def test_of_several_models_the_one_of_that_name_is_asked_or_none(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    """The first of a list may be anybody: its answers would be fitted on as if they were ours."""
    scripted.served = ["other", "m"]
    assert await _collect(scripted, tmp_path / "a.jsonl", _questions(1)) == 1
    assert scripted.bodies[0]["model"] == "m"
    scripted.served = ["other", "another"]
    with pytest.raises(ChatError, match="serves other, another, but no model called 'm'"):
        await _collect(scripted, tmp_path / "b.jsonl", _questions(1))
    scripted.owner = {"owned_by": "hneurons"}  # names of one model
    assert await _collect(scripted, tmp_path / "b.jsonl", _questions(1)) == 1
    assert scripted.bodies[-1]["model"] == "other"


async def test_a_second_run_asks_only_what_is_missing(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    await _collect(scripted, path, _questions(5))
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])  # killed while it wrote the last line
    assert await _collect(scripted, path, _questions(8)) == 4
    answers = read_records(path, Answer)[1]
    assert sorted(answer.id for answer in answers) == sorted(f"set/ask/q{i}/0" for i in range(8))


@pytest.mark.parametrize(
    ("field", "edited"),
    [("gold", ("x", "y")), ("group", "h"), ("split", "test"), ("prompt", "Q?"), ("question", "Q?")],
)
async def test_a_question_that_was_edited_is_not_taken_for_the_one_that_was_asked(
    scripted: ScriptedServer, tmp_path: Path, field: str, edited: object
) -> None:
    """Corrected answers changed nothing, in silence: labels are made of what was asked."""
    path, header = tmp_path / "a.jsonl", _header(Sampling())
    await _collect(scripted, path, _questions(3))
    before = path.read_bytes()
    first, second, third = _questions(3)
    second = second._replace(**{field: edited})
    with pytest.raises(RecordError, match=rf"question 'set/ask/q1' was asked with {field} .*again"):
        missing([first, second, third], path, header=header, samples=1)
    assert path.read_bytes() == before


async def test_a_question_that_is_asked_no_more_is_told_of(
    scripted: ScriptedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It still counts: files may be asked one by one, so it cannot be an error."""
    path = tmp_path / "a.jsonl"
    await _collect(scripted, path, _questions(3))
    assert not caplog.text
    await _collect(scripted, path, _questions(1))
    assert "2 questions that are not asked now, such as 'set/ask/q1'" in caplog.text


async def test_samples_of_a_question_have_seeds_of_their_own_that_do_not_depend_on_order(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    """Ten samples with one seed are one sample; a resumed run must draw what a whole one draws."""
    sampling = Sampling(samples=3, temperature=1.0, top_p=0.9, top_k=50)
    await _collect(scripted, tmp_path / "a.jsonl", _questions(3), sampling=sampling)
    await _collect(scripted, tmp_path / "b.jsonl", _questions(3)[::-1], sampling=sampling)
    first, second = (
        {a.id: a.text for a in read_records(tmp_path / name, Answer)[1]}
        for name in ("a.jsonl", "b.jsonl")
    )
    assert first == second
    assert len(set(first.values())) == 9
    assert all((b["top_p"], b["top_k"]) == (0.9, 50) for b in scripted.bodies)


async def test_ordinary_prose_is_asked_once_and_as_long_as_its_style_says(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    """Ten stubs of fifty tokens each are no ordinary long answers."""
    prose = [
        q._replace(id=f"p/{q.id}", prompt=f"P {q.id}", gold=(), max_tokens=160)
        for q in _questions(2)
    ]
    draw = Sampling(samples=3, temperature=1.0, max_tokens=50)
    assert (
        await _collect(scripted, tmp_path / "a.jsonl", [*_questions(2), *prose], sampling=draw) == 8
    )
    limits = Counter((b["messages"][0]["content"][0], b["max_tokens"]) for b in scripted.bodies)
    assert limits == {("Q", 50): 6, ("P", 160): 2}


async def test_the_bar_starts_with_what_is_there_and_tells_rate_and_time_left(
    scripted: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bar that starts at nothing again makes people think that their answers are lost."""
    path, header = tmp_path / "a.jsonl", _header(Sampling())
    await _collect(scripted, path, _questions(5))
    capsys.readouterr()
    asks = missing(_questions(8), path, header=header, samples=1)
    await collect(
        asks, path, base_url=scripted.url, header=header, sampling=Sampling(), in_flight=1, done=5
    )
    shown = capsys.readouterr().err
    assert "5/8" in shown
    assert "8/8" in shown
    assert "0/8" not in shown
    assert re.search(r"\[\d\d:\d\d<[\d:?]+, +[\d.?]+ ?(answer/s|s/answer)", shown)


async def test_the_finished_file_is_the_same_however_often_it_was_cut(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    """Answers come in any order; every later artifact is made of this file's bytes."""
    draw = Sampling(samples=3, temperature=1.0)
    questions = _questions(7)
    await _collect(scripted, tmp_path / "whole.jsonl", questions, sampling=draw, in_flight=7)
    sort_records(tmp_path / "whole.jsonl", Answer)
    path = tmp_path / "cut.jsonl"
    for torn in range(6):
        scripted.bodies.clear()
        scripted.refuse = lambda body, attempt: (400, {}, {}) if len(scripted.bodies) >= 3 else None
        with pytest.raises(ChatError):
            await _collect(scripted, path, questions[::-1], sampling=draw, in_flight=3)
        body = path.read_bytes()
        path.write_bytes(body[: -torn * 9] if torn else body)
        scripted.refuse = lambda body, attempt: None
    await _collect(scripted, path, questions, sampling=draw)
    assert path.read_bytes() != (tmp_path / "whole.jsonl").read_bytes()
    sort_records(path, Answer)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_the_papers_sampling_is_one_flag_and_each_part_of_it_can_be_said_otherwise() -> None:
    """Trap 11: a default that cannot be switched off is no default."""
    assert sampling(True, samples=None, seed=0) == PAPER
    assert sampling(False, samples=None, seed=0) == Sampling()
    mixed = sampling(True, samples=4, temperature=0.7, top_p=1.0, top_k=0, max_tokens=9, seed=3)
    assert mixed == Sampling(samples=4, temperature=0.7, top_p=1.0, top_k=0, max_tokens=9, seed=3)


async def test_no_more_requests_are_open_than_allowed(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    await _collect(scripted, tmp_path / "a.jsonl", _questions(40), in_flight=3)
    assert scripted.most_open <= 3


async def test_a_full_queue_is_waited_for_as_the_server_says(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    def refuse(body: dict[str, Any], attempt: int) -> Reply | None:
        return (429, {"retry-after": "0"}, {"error": {"message": "full"}}) if attempt < 3 else None

    scripted.refuse = refuse
    assert await _collect(scripted, tmp_path / "a.jsonl", _questions(6)) == 6
    assert set(scripted.attempts.values()) == {3}


async def test_a_refusal_for_good_names_the_question_and_keeps_what_was_answered(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    def refuse(body: dict[str, Any], attempt: int) -> Reply | None:
        bad = body["messages"][0]["content"] == "Q3?"
        return (400, {}, {"error": {"message": "too long"}}) if bad else None

    scripted.refuse = refuse
    with pytest.raises(ChatError, match=r"set/ask/q3.*too long"):
        await _collect(scripted, tmp_path / "a.jsonl", _questions(6), in_flight=1)
    assert len(read_records(tmp_path / "a.jsonl", Answer)[1]) == 3
    assert scripted.attempts["Q3?"] == 1


async def test_a_server_without_token_ids_is_refused(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    """Trap 7: going on without ids would mean to guess them."""
    choice = {"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}
    scripted.refuse = lambda body, attempt: (200, {}, {"id": "x", "choices": [choice]})
    with pytest.raises(CollectError, match="return_token_ids"):
        await _collect(scripted, tmp_path / "a.jsonl", _questions(1))


async def test_what_is_no_openai_server_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ChatError, match="no OpenAI-compatible server"):
        await collect(
            [Ask(_questions(1)[0], 0)],
            tmp_path / "a.jsonl",
            base_url="http://127.0.0.1:9",
            header=_header(Sampling()),
            sampling=Sampling(),
            in_flight=1,
        )


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that reaches nobody."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("proxy")
def test_a_server_of_our_own_is_asked_without_the_proxy(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loopback through a proxy: ten minutes, then "not ready"."""
    monkeypatch.setattr("offline.child_server.START_SECONDS", 1.0)
    process = SimpleNamespace(poll=lambda: None)
    _wait_until_ready(process, scripted.url)  # type: ignore[arg-type]


@pytest.mark.usefixtures("proxy")
def test_a_proxy_stands_before_the_server_that_is_named_and_not_before_our_own(
    scripted: ScriptedServer,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = LoadedTokenizer(tokenizer, "t", "c")
    monkeypatch.setattr("offline.collect.load_tokenizer", lambda *args, **kwargs: loaded)
    monkeypatch.setattr("offline.collect.child_server", lambda *a, **kw: nullcontext(scripted.url))

    def ask(base_url: str | None) -> None:
        ask_all(
            "m", tmp_path, _questions(2), Sampling(), base_url=base_url, served_model=None,
            revision=None, in_flight=2, model_dtype="auto", api_key=None,
        )  # fmt: skip

    with pytest.raises(ChatError, match="no OpenAI-compatible server"):
        ask(scripted.url)
    ask(None)
    assert len(read_records(tmp_path / "answers.jsonl", Answer)[1]) == 2


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    """A child that dies at start must not be waited for, and its own words are the reason."""
    with (
        pytest.raises(ChildServerError, match="no-such-model"),
        child_server(str(tmp_path / "no-such-model"), in_flight=1),
    ):
        pytest.fail("it came up")
