"""The whole service over vLLM, as a user meets it: the demo model, the shipped probe, real HTTP.

One server, compiled as in production, serves all tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from pydantic import BaseModel, ConfigDict, Field

QUESTION = [{"role": "user", "content": "Who wrote the novel Moby-Dick, and when was it printed?"}]
VLLM_ARGS = "--kv-cache-memory-bytes 512M"
PATIENCE = 60.0  # for what takes a second on an idle machine


@dataclass
class Server:
    """The process, its address and the processes that vLLM has started for it."""

    process: subprocess.Popen[str]
    address: str
    log: Path

    def chat(self, **fields: Any) -> dict[str, Any]:
        body = {"model": "demo", "messages": QUESTION, "temperature": 0, **fields}
        answer = httpx.post(f"{self.address}/v1/chat/completions", json=body, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, **fields: Any) -> list[Any]:
        """Everything that a stream says, `[DONE]` included; what cuts it raises."""
        body = {"model": "demo", "messages": QUESTION, "stream": True, **fields}
        url = f"{self.address}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=PATIENCE) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines if line[0] != ":"]


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Server]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = folder / "log"
    command = [sys.executable, "-m", "server", "demo", "--engine", "vllm", "--port", "0"]
    command += ["--vllm-args", VLLM_ARGS, "--drain-delay", "0", *flags]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        )
    watchdog = threading.Timer(600, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline()
        found = re.search(r"curl (http://[\d.:]+)/", line)
        assert found, f"not ready: {line}{log.read_text()[-4000:]}"
        yield Server(process, found[1], log)
    finally:
        watchdog.cancel()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, demo_model_path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, "--drain-timeout", "1") as running:
        yield running


def text_and_tokens(events: list[Any]) -> tuple[str, list[Any], dict[str, Any]]:
    assert events[-1] == "[DONE]"
    text, tokens, summary = "", [], {}
    for chunk in events[:-1]:
        for choice in chunk["choices"]:
            text += choice["delta"].get("content", "")
            risk = choice.get("risk") or {}
            tokens += risk.get("tokens", [])
            summary = risk if "status" in risk else summary
    return text, tokens, summary


def test_an_answer_comes_with_its_risk_streamed_or_not(server):
    """I1, I2: the shipped probe reads vLLM's neurons; both ways give the same numbers."""
    answer = server.chat(risk=True, max_tokens=24)
    choice, usage = answer["choices"][0], answer["usage"]
    risk = choice["risk"]
    assert risk["status"] == "scored"
    assert len(risk["tokens"]) == usage["completion_tokens"] == 24
    assert all(0 <= token["risk"] <= 1 for token in risk["tokens"])
    text, tokens, summary = text_and_tokens(server.events(risk=True, max_tokens=24, temperature=0))
    assert text == choice["message"]["content"]
    assert tokens == risk["tokens"]
    assert summary["score"] == risk["score"]
    without = server.chat(risk=False, max_tokens=24)
    assert without["choices"][0]["message"]["content"] == text, "I6"


def test_a_given_text_is_scored_like_a_written_one(server):
    """POST /v1/risk reads in one pass what decoding has read token by token (bf16: 0.03)."""
    answer = server.chat(risk=True, max_tokens=16)
    choice = answer["choices"][0]
    body = {"model": "demo", "messages": QUESTION, "answer": choice["message"]["content"]}
    scored = httpx.post(f"{server.address}/v1/risk", json=body, timeout=PATIENCE)
    assert scored.status_code == 200, scored.text
    again = scored.json()["risk"]["tokens"][:16]
    for one, other in zip(choice["risk"]["tokens"], again, strict=True):
        assert one["token_id"] == other["token_id"]
        assert one["risk"] == pytest.approx(other["risk"], abs=0.05)


def test_the_openai_client_gets_choices_stops_and_log_probabilities(server):
    """n, stop, seed, alpha and logprobs through the client that everybody has."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
    ask = client.chat.completions.create
    two = ask(
        model="demo", messages=QUESTION, n=2, seed=5, max_tokens=12, extra_body={"risk": True}
    )
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].message.content != two.choices[1].message.content
    again = ask(model="demo", messages=QUESTION, n=2, seed=5, max_tokens=12)
    assert again.choices[1].message.content == two.choices[1].message.content
    whole = ask(model="demo", messages=QUESTION, temperature=0, max_tokens=30)
    word = whole.choices[0].message.content.split()[4]
    cut = ask(model="demo", messages=QUESTION, temperature=0, max_tokens=30, stop=word)
    assert cut.choices[0].finish_reason == "stop"
    assert whole.choices[0].message.content.startswith(cut.choices[0].message.content)
    assert word not in cut.choices[0].message.content
    told = ask(
        model="demo", messages=QUESTION, temperature=0, max_tokens=6, logprobs=True, top_logprobs=2
    )
    for entry in told.choices[0].logprobs.content:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
    dosed = ask(
        model="demo",
        messages=QUESTION,
        temperature=0,
        max_tokens=12,
        extra_body={"risk": {"alpha": 0}},
    )
    assert dosed.choices[0].risk["calibrated"] is False


class Book(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    author: str = Field(max_length=30)
    year: int = Field(ge=1500, le=2000)
    language: Literal["English", "Greek"]


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


def test_an_answer_is_json_of_its_schema_with_a_risk_for_every_token(server):
    """The grammar lets the end of the turn come only after the last brace."""
    fields = {
        "response_format": schema_format(Book.model_json_schema()),
        "max_tokens": 200,
        "risk": True,
    }
    answer = server.chat(**fields)
    (choice,), usage = answer["choices"], answer["usage"]
    assert choice["finish_reason"] == "stop"
    Book.model_validate_json(choice["message"]["content"])
    risk = choice["risk"]
    assert (risk["status"], risk["unscored"]) == ("scored", {"not_read": 1})  # the end of the turn
    assert len(risk["tokens"]) == usage["completion_tokens"]
    text, tokens, summary = text_and_tokens(server.events(temperature=0, **fields))
    assert text == choice["message"]["content"]
    assert tokens == risk["tokens"]
    assert summary["score"] == risk["score"]
    hot = server.chat(**{**fields, "temperature": 1.5, "n": 2, "seed": 3})
    for choice in hot["choices"]:
        Book.model_validate_json(choice["message"]["content"])


def test_json_object_is_any_object(server):
    """What the model makes of it is its own affair, but it is an object and it ends."""
    fields = {"response_format": {"type": "json_object"}, "max_tokens": 300, "risk": True}
    question = [{"role": "user", "content": "Give name and height of a mountain as JSON."}]
    choice = server.chat(messages=question, **fields)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert isinstance(json.loads(choice["message"]["content"]), dict)
    assert choice["risk"]["status"] == "scored"


def test_json_cut_by_its_length_is_read_to_the_last_token(server):
    """The hidden extra step is sampled under the grammar, too, and only its reading counts."""
    wanted = schema_format(Book.model_json_schema())
    answer = server.chat(response_format=wanted, risk=True, max_tokens=4)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].lstrip().startswith('{"')
    assert len(choice["risk"]["tokens"]) == answer["usage"]["completion_tokens"] == 4
    assert choice["risk"]["unscored"] == {}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 7}}},
        {"$ref": "#/$defs/missing"},
    ],
    ids=json.dumps,
)
def test_a_schema_without_a_grammar_is_refused_and_harms_nobody(server, schema):
    """Never a 5xx, and never a keyword that is left out without a word."""
    body = {"model": "demo", "messages": QUESTION, "response_format": schema_format(schema)}
    answer = httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=PATIENCE)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "response_format.json_schema.schema"
    assert server.chat(max_tokens=2)["choices"][0]["finish_reason"] == "length"


def test_many_at_once_are_each_as_alone(server):
    """Misattributed rows show as another request's risk (bf16 in other batches: 0.05)."""
    prompts = [f"Name the capital of {name}." for name in ("France", "Peru", "Japan", "Kenya")] * 4
    fields = {"risk": True, "max_tokens": 12}

    def ask(prompt: str) -> list[Any]:
        answer = server.chat(messages=[{"role": "user", "content": prompt}], **fields)
        return answer["choices"][0]["risk"]["tokens"]

    alone = {prompt: ask(prompt) for prompt in set(prompts)}
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, prompts))
    for prompt, tokens in zip(prompts, together, strict=True):
        same = [one for one in zip(alone[prompt], tokens, strict=False)]
        for one, other in same:
            if one["token_id"] != other["token_id"]:
                break  # two nearly equal logits: from here on the texts differ
            assert one["risk"] == pytest.approx(other["risk"], abs=0.05)


def test_a_client_that_leaves_frees_its_place(server):
    """I5 over a real socket."""
    body = {"model": "demo", "messages": QUESTION, "stream": True, "max_tokens": 1500}
    body["ignore_eos"] = True
    with httpx.stream("POST", f"{server.address}/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    gone = re.compile(r"^hneurons_requests_running{.*} 0", re.MULTILINE)
    wait_until(lambda: gone.search(httpx.get(f"{server.address}/metrics").text) is not None)


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - started
