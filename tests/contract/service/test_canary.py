"""R40: what clients send shows up nowhere, and adds no series, however much of it there is.

A whole server with everything on that writes something down: logs at debug level, metrics, the
audit log and an OpenTelemetry collector.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

NAMES = 10_000
KEY = "sk-canary-key-9d2c"
SAID = "canary-prompt-51fe"  # read by the model, and not repeated
WRITTEN = "canary-answer-77aa 1969"  # the fake engine repeats the user's text
HEADERS = {
    "authorization": f"Bearer {KEY}",
    "baggage": "user=canary-baggage",
    "cookie": "session=canary-cookie",
    "idempotency-key": "canary-idempotency",
    "openai-organization": "canary-organisation",
    "referer": "https://canary-referer.example/canary",
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "tracestate": "vendor=canary-state",
    "user-agent": "canary-agent/1.0",
    "x-forwarded-for": "canary-forwarded",
    "x-request-id": "canary/id",  # no id of the allowed form, which would be echoed
}
OWN = {"user": "canary-user", "metadata": {"canary": "canary"}, "stop": ["canary-stop"]}
REFUSED: tuple[dict[str, Any], ...] = (
    {"model": "canary-model"},
    {"temperature": "canary"},
    {"messages": [{"role": "canary", "content": SAID}]},
    {"response_format": {"type": "canary"}},
    {"risk": {"probe": "canary"}},
    {"risk": {"alpha": "canary"}},
    {"risk": {"policy": "canary"}},
    {"risk": {"a canary of more than a plain name": 1}},
    {"tools": ["canary"]},
    {"stop": ["canary"] * 9},
    {"logit_bias": {"a canary of more than a plain name": 1}},
    {"max_tokens": 99_999},
)


def messages(written: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SAID}, {"role": "user", "content": written}]


def ask_everything(server: Any, answer: Callable[..., bytes]) -> list[str]:
    """Plant canaries in every way; the refusals, with their headers."""
    refusals = []

    def post(path: str, *, refused: bool = False, **options: Any) -> None:
        response = server.client.post(path, headers=HEADERS, **options)
        assert (response.status_code >= 400) == refused, response.text
        if refused:
            refusals.append(f"{response.headers} {response.text}")

    chat = {"model": "m", "messages": messages(WRITTEN), **OWN}
    for stream in (False, True):
        for risk in (True, {"policy": "withhold"}, {"policy": "stop"}, {"policy": "retry"}, False):
            post("/v1/chat/completions", json={**chat, "risk": risk, "stream": stream})
        post("/v1/completions", json={"model": "m", "prompt": WRITTEN, "stream": stream, **OWN})
        body = {**chat, "messages": messages(f"[nan:2] {WRITTEN}"), "risk": True, "stream": stream}
        post("/v1/chat/completions", json=body)
    post("/v1/risk", json={"prompt": SAID, "text": WRITTEN})
    post("/v1/risk", json={"messages": messages(SAID), "answer": WRITTEN})

    for fields in REFUSED:
        post("/v1/chat/completions", refused=True, json={**chat, **fields})
    failing = {**chat, "messages": messages(f"[fail:3] {WRITTEN}"), "risk": True}
    post("/v1/chat/completions", refused=True, json=failing)
    for broken in (json.dumps(chat)[:-1], '{"canary": NaN}', '{"canary": 1, "canary": 1}', SAID):
        post("/v1/risk", refused=True, content=broken)
    post("/v1/risk", refused=True, json={"token_ids": ["canary"], "prompt_token_ids": [1]})
    post("/canary?canary=canary", refused=True, json=chat)
    missing = server.client.get("/v1/models/canary", headers=HEADERS)
    stranger = {**HEADERS, "authorization": "Bearer sk-canary-of-nobody"}
    denied = server.client.post("/v1/chat/completions", headers=stranger, json=chat)
    assert (missing.status_code, denied.status_code) == (404, 401)
    refusals += [f"{response.headers} {response.text}" for response in (missing, denied)]
    with server.raw(b"GET /canary HTTP/9 canary\r\ncanary: canary\r\n\r\n") as sock:
        refusals.append(answer(sock).decode())

    endless = {**chat, "messages": messages("[slow:20][loop]canary"), "stream": True}
    with server.client.stream(
        "POST", "/v1/chat/completions", headers=HEADERS, json={**endless, "risk": True}
    ) as left:
        next(left.iter_lines())
    stream = {**chat, "messages": messages(f"[fail:3] {WRITTEN}"), "stream": True}
    lines = server.client.post("/v1/chat/completions", headers=HEADERS, json=stream).text
    return refusals + [line for line in lines.splitlines() if '"error"' in line]


def die(server: Any) -> str:
    """The last stream, and the end of the process; its error event."""
    body = {"model": "m", "messages": messages(f"[die:3] {WRITTEN}"), "stream": True}
    lines = server.client.post("/v1/chat/completions", headers=HEADERS, json=body).text
    assert server.wait(30) == 4
    (event,) = [line for line in lines.splitlines() if '"error"' in line]
    return event


def test_a_canary_leaves_no_trace(
    start_server: Any, answer: Callable[..., bytes], collector: Any, tmp_path: Path
) -> None:
    """Prompts, answers and keys belong to the client: not to logs, metrics, traces or errors."""
    audit = tmp_path / "audit.jsonl"
    flags = ("--log-level", "debug", "--audit-log", str(audit), "--max-num-seqs", "4")
    traces = ("--otlp-traces-endpoint", collector.endpoint, "--heartbeat", "2")
    with start_server(*flags, *traces, environment={"HNEURONS_API_KEYS": KEY}) as server:
        named = {**HEADERS, "x-request-id": "seen-1"}
        body = {"model": "m", "messages": messages(WRITTEN), "risk": True}
        seen = server.client.post("/v1/chat/completions", headers=named, json=body)
        assert WRITTEN in seen.text
        refusals = ask_everything(server, answer)
        page = server.client.get("/metrics", headers=HEADERS).text
        refusals.append(die(server))
        output = server.ready_line + server.process.stdout.read()
        log = server.log.read_text()
    exported = [body.decode("latin-1") for _, body in collector.received]
    levels = {json.loads(line)["level"] for line in log.splitlines()}
    assert levels >= {"DEBUG", "INFO", "CRITICAL"}
    assert series(page) > 100
    assert len(refusals) >= len(REFUSED) + 9
    assert len(audit.read_text().splitlines()) >= 20
    assert len(collector.spans) >= 20
    assert len(collector.events) >= 15
    # What an operator may look for is found in each of these places, so they are the right ones.
    assert all("seen-1" in place for place in (log, audit.read_text(), "".join(exported)))
    for place in (log, output, page, audit.read_text(), *exported, *refusals):
        assert "canary" not in place.lower()


def series(page: str) -> int:
    return sum(len(family.samples) for family in text_string_to_metric_families(page))


def test_ten_thousand_made_up_names_add_no_series(start_server: Any) -> None:
    """A label that a client chooses fills Prometheus' memory from outside."""

    def request(i: int) -> tuple[str, str, dict[str, Any] | None]:
        name = secrets.token_hex(8)
        chat = {"model": "m", "messages": [{"role": "user", "content": "1"}], "max_tokens": 2}
        kinds: tuple[tuple[str, str, dict[str, Any] | None], ...] = (
            ("POST", "/v1/chat/completions", {**chat, "user": name, "risk": True}),
            ("POST", "/v1/chat/completions", {**chat, "model": name}),
            ("POST", "/v1/chat/completions", {**chat, "user": [name]}),
            ("POST", "/v1/chat/completions", {**chat, "risk": {"probe": name}}),
            ("POST", f"/v1/{name}", None),
            ("GET", f"/v1/models/{name}", None),
            ("POST", "/v1/risk", {"model": name, "text": name, "prompt": name}),
        )
        return kinds[i % len(kinds)]

    async def ask_all(address: str, numbers: range) -> set[int]:
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=address, limits=limits, timeout=60) as client:

            async def ask(i: int) -> int:
                method, path, body = request(i)
                name = secrets.token_hex(8)
                headers = {"x-request-id": name, "user-agent": name, "authorization": name}
                response = await client.request(method, path, json=body, headers=headers)
                return response.status_code

            statuses: set[int] = set()
            for i in range(0, len(numbers), 100):
                statuses |= set(await asyncio.gather(*map(ask, numbers[i : i + 100])))
            return statuses

    with start_server("--max-waiting-requests", "100") as server:
        address = f"http://127.0.0.1:{server.port}"
        kinds = asyncio.run(ask_all(address, range(100)))  # of each the first one begins its series
        before = series(server.client.get("/metrics").text)
        statuses = asyncio.run(ask_all(address, range(100, NAMES)))
        after = series(server.client.get("/metrics").text)
    assert statuses == kinds == {200, 400, 404}
    assert before == after < 500
