"""The body limit: counted while it streams in, checked before the application sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from server.limits import BodyLimit

JSON = {"content-type": "application/json"}


class Echo:
    """An application that remembers what it was given."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def echo() -> Echo:
    return Echo()


async def post(app: Any, content: Any, headers: dict[str, str] = JSON) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post("/x", content=content, headers=headers)


def body_of(size: int) -> bytes:
    """Valid JSON of exactly `size` bytes."""
    frame = b'{"a":""}'
    return frame[:-2] + b"x" * (size - len(frame)) + frame[-2:]


async def stream(body: bytes) -> AsyncIterator[bytes]:
    """Sent in chunks, without Content-Length."""
    for start in range(0, len(body), 10):
        yield body[start : start + 10]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_is_refused_only_beyond_the_limit(echo: Echo, chunked: bool) -> None:
    """Prevents: F7, and a limit that only looks at Content-Length."""
    limited = BodyLimit(echo, max_bytes=100)
    for size, status in ((100, 200), (101, 413), (100_000, 413)):
        content = stream(body_of(size)) if chunked else body_of(size)
        assert (await post(limited, content)).status_code == status
    assert echo.bodies == [body_of(100)]


async def test_a_refused_body_is_not_read_to_its_end(echo: Echo) -> None:
    """Prevents: a server that swallows gigabytes before it says no."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 10_000:
            sent += 1
            yield b"x" * 10

    scope = {"type": "http", "method": "POST", "headers": [(b"transfer-encoding", b"chunked")]}
    chunks = endless()
    answer: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": await anext(chunks), "more_body": True}

    async def send(message: Message) -> None:
        answer.append(message)

    await BodyLimit(echo, max_bytes=100)(scope, receive, send)
    assert answer[0]["status"] == 413
    assert sent == 11


async def test_a_silent_body_is_given_up() -> None:
    """Prevents: a socket that holds a task for ever by sending half a body."""

    async def receive() -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    answer: list[Message] = []

    async def send(message: Message) -> None:
        answer.append(message)

    scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"5")]}
    limited = BodyLimit(Echo(), seconds_between_bytes=0.01)
    await asyncio.wait_for(limited(scope, receive, send), timeout=2)
    assert answer[0]["status"] == 408
    assert (b"connection", b"close") in answer[0]["headers"]


async def test_a_dripping_body_is_given_up() -> None:
    """Prevents: one byte every nine seconds for ever."""

    async def receive() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    answer: list[Message] = []

    async def send(message: Message) -> None:
        answer.append(message)

    scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"500000")]}
    limited = BodyLimit(Echo(), seconds_between_bytes=5, seconds_per_body=0.1)
    await asyncio.wait_for(limited(scope, receive, send), timeout=2)
    assert answer[0]["status"] == 408


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonx",
        "application/json; charset=utf-16",
        "application/json; charset=latin-1",
        "text/json",
    ],
)
async def test_only_json_in_utf8_is_taken(echo: Echo, kind: str) -> None:
    """Prevents: CVE-2021-32677, a form of a foreign page that reaches the API without asking."""
    response = await post(BodyLimit(echo), b'{"a": 1}', {"content-type": kind})
    assert response.status_code == 415
    assert echo.bodies == []


@pytest.mark.parametrize(
    "kind",
    ["application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"'],
)
async def test_json_is_taken_however_it_is_spelled(echo: Echo, kind: str) -> None:
    """Prevents: refusing real clients."""
    assert (await post(BodyLimit(echo), b'{"a": 1}', {"content-type": kind})).status_code == 200


async def test_bad_json_never_reaches_the_application(echo: Echo) -> None:
    """Prevents: the schema seeing NaN."""
    response = await post(BodyLimit(echo), b'{"a": NaN}')
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"
    assert echo.bodies == []


async def test_a_request_without_a_body_passes(echo: Echo) -> None:
    """Prevents: GET /v1/models asking for a content type."""
    transport = httpx.ASGITransport(BodyLimit(echo))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/x")).status_code == 200


async def test_the_application_still_hears_a_disconnect() -> None:
    """Prevents: F9, a replayed body that hides that the client has gone."""
    heard: list[str] = []
    messages = [
        {"type": "http.request", "body": json.dumps({}).encode(), "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([(await receive())["type"], (await receive())["type"]])

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        raise AssertionError(message)

    headers = [(b"content-length", b"2"), (b"content-type", b"application/json")]
    await BodyLimit(app)({"type": "http", "method": "POST", "headers": headers}, receive, send)
    assert heard == ["http.request", "http.disconnect"]
