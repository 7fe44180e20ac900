"""Phases, admission, and the last word that open requests get."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from server.api.errors import APIError
from server.engines.base import Health
from server.lifecycle import Gate, Lifecycle, Phase

LAST_WORD = APIError(503, "stopping", code="shutdown", retry_after=5)


class Patient:
    """An engine's health, as the test sets it."""

    def __init__(self) -> None:
        self.now = Health(alive=True)

    def __call__(self) -> Health:
        return self.now


@pytest.fixture
def patient() -> Patient:
    return Patient()


@pytest.fixture
def lifecycle(patient: Patient) -> Lifecycle:
    return Lifecycle(health=patient, heartbeat=60)


async def get(app: Gate, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path)


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"served"})


def test_phases_follow_each_other(lifecycle: Lifecycle) -> None:
    """Prevents: a server that is ready before its tests, or after it was told to stop."""
    assert lifecycle.phase is Phase.STARTING
    lifecycle.begin_serving()
    assert lifecycle.phase is Phase.READY
    lifecycle.begin_draining()
    assert lifecycle.phase is Phase.DRAINING
    lifecycle.begin_serving()
    assert lifecycle.phase is Phase.DRAINING


def test_a_dead_engine_is_seen_at_once_and_for_good(lifecycle: Lifecycle, patient: Patient) -> None:
    """Prevents: vLLM #39863, an API that says 200 while the engine is dead."""
    lifecycle.begin_serving()
    patient.now = Health(alive=False, reason="out of memory")
    assert lifecycle.phase is Phase.DEAD
    assert lifecycle.reason == "out of memory"
    patient.now = Health(alive=True)
    lifecycle.begin_draining()
    assert lifecycle.phase is Phase.DEAD


@pytest.mark.parametrize(
    ("health", "expected"),
    [
        (Health(alive=True, running=1, seconds_since_step=61), Phase.DEAD),
        (Health(alive=True, waiting=1, seconds_since_step=61), Phase.DEAD),
        (Health(alive=True, running=1, seconds_since_step=59), Phase.READY),
        (Health(alive=True, seconds_since_step=3600), Phase.READY),
    ],
)
def test_an_engine_hangs_when_it_has_work_and_makes_no_step(
    lifecycle: Lifecycle, patient: Patient, health: Health, expected: Phase
) -> None:
    """Prevents: an idle server that is restarted, and a hung one that is not."""
    lifecycle.begin_serving()
    patient.now = health
    assert lifecycle.phase is expected


async def test_requests_are_refused_unless_ready(lifecycle: Lifecycle, patient: Patient) -> None:
    """Prevents: work that is accepted and then lost; a client that is not told when to retry."""
    gate = Gate(answer, lifecycle=lifecycle)
    for prepare, code in (
        (lambda: None, "starting"),
        (lifecycle.begin_serving, None),
        (lifecycle.begin_draining, "draining"),
        (lambda: setattr(patient, "now", Health(alive=False)), "engine_dead"),
    ):
        prepare()
        response = await get(gate, "/v1/models")
        if code is None:
            assert response.text == "served"
        else:
            assert response.status_code == 503
            assert response.json()["error"]["code"] == code
            assert int(response.headers["retry-after"]) > 0
            assert response.headers.get("connection") == (
                None if code == "engine_dead" else "close"
            )  # a pooled client would send its next request here, too
        assert (await get(gate, "/livez")).text == "served"


class Call:
    """One ASGI call to a gate, kept open by `app`, and what came out of it."""

    def __init__(self, gate: Gate) -> None:
        self.messages: list[Message] = []
        scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": []}
        self.task = asyncio.create_task(gate(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    async def _send(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages)


async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
    await asyncio.sleep(3600)


async def thinking(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.sleep(3600)


async def test_an_open_stream_ends_with_an_error_event(lifecycle: Lifecycle) -> None:
    """Prevents: F15, a client that sees a cut body and cannot tell it from an answer."""
    lifecycle.begin_serving()
    gate = Gate(streaming, lifecycle=lifecycle)
    call = Call(gate)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert gate.open_requests == 1
    gate.end_all(LAST_WORD)
    await asyncio.wait_for(call.task, 1)
    first, error, done = call.body.split(b"\n\n")[:3]
    assert first == b"data: {}"
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "shutdown"
    assert done == b"data: [DONE]"
    assert call.messages[-1]["more_body"] is False
    assert gate.open_requests == 0


async def test_a_request_that_has_not_answered_yet_gets_a_503(lifecycle: Lifecycle) -> None:
    """Prevents: a connection reset where a retry could have been told."""
    lifecycle.begin_serving()
    gate = Gate(thinking, lifecycle=lifecycle)
    call = Call(gate)
    await asyncio.sleep(0)
    gate.end_all(LAST_WORD)
    await asyncio.wait_for(call.task, 1)
    assert call.messages[0]["status"] == 503
    assert (b"retry-after", b"5") in call.messages[0]["headers"]


async def test_an_exception_in_a_stream_becomes_an_error_event(lifecycle: Lifecycle) -> None:
    """Prevents: F12, a stream without finish_reason that the client takes for complete."""

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        raise ValueError("canary")

    lifecycle.begin_serving()
    call = Call(Gate(broken, lifecycle=lifecycle))
    with pytest.raises(ValueError, match="canary"):
        await call.task
    assert b'"code":"internal_error"' in call.body
    assert b"canary" not in call.body
    assert call.body.endswith(b"data: [DONE]\n\n")


async def test_the_handlers_own_timeouts_stay_its_own(lifecycle: Lifecycle) -> None:
    """Prevents: a TimeoutError of a handler that is taken for the end of the server."""

    async def impatient(scope: Scope, receive: Receive, send: Send) -> None:
        raise TimeoutError

    lifecycle.begin_serving()
    with pytest.raises(TimeoutError):
        await Call(Gate(impatient, lifecycle=lifecycle)).task
