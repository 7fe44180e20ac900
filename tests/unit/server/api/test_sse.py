"""Streams and clients that leave: the work ends with its reader."""

from __future__ import annotations

import asyncio

import pytest

from server.api.sse import DONE, ClientGoneError, EventStream, event, unless_gone


async def forever():
    await asyncio.Event().wait()


async def disconnected():
    return {"type": "http.disconnect"}


class Lines:
    """An endless stream that remembers whether it was closed."""

    def __init__(self):
        self.is_closed = False

    async def __call__(self):
        try:
            while True:
                yield event({"a": 1})
                await asyncio.sleep(0)
        finally:
            self.is_closed = True


async def test_work_is_cancelled_when_the_client_leaves():
    """Starlette lets a request that is not streamed run to its end for nobody."""
    was_cancelled = asyncio.Event()

    async def work():
        try:
            await forever()
        except asyncio.CancelledError:
            was_cancelled.set()
            raise

    with pytest.raises(ClientGoneError):
        await unless_gone(disconnected, work())
    assert was_cancelled.is_set()


async def test_work_that_ends_gives_its_result_or_its_error():
    """The race must not swallow what the work has to say."""

    async def fail():
        raise ValueError("from the work")

    assert await unless_gone(forever, asyncio.sleep(0, "done")) == "done"
    with pytest.raises(ValueError, match="from the work"):
        await unless_gone(forever, fail())


async def test_cancelling_the_race_cancels_the_work():
    """The server's own deadline cancels from outside."""
    was_cancelled = asyncio.Event()

    async def work():
        try:
            await forever()
        finally:
            was_cancelled.set()

    race = asyncio.create_task(unless_gone(forever, work()))
    await asyncio.sleep(0)
    race.cancel()
    with pytest.raises(asyncio.CancelledError):
        await race
    assert was_cancelled.is_set()


async def test_a_stream_is_sent_whole():
    """Status, lines, and the empty last body that ends the response."""

    async def rest():
        yield DONE

    sent = []

    async def send(message):
        sent.append(message)

    await EventStream(event({"a": "é"}), rest(), on_abort=pytest.fail)({}, forever, send)
    assert sent[0]["status"] == 200
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"x-accel-buffering"] == b"no"
    assert b"content-length" not in headers
    body = b"".join(message["body"] for message in sent[1:])
    assert body.decode() == 'data: {"a":"é"}\n\ndata: [DONE]\n\n'
    assert [message["more_body"] for message in sent[1:]] == [True, True, False]


@pytest.mark.parametrize("reason", ["disconnect", "slow_client"])
async def test_a_stream_without_reader_is_closed_and_counted(reason):
    """A slow reader holds a slot of the engine as long as it pleases, otherwise."""
    lines, told = Lines(), []
    left = asyncio.Event()

    async def receive():
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.body":
            if reason == "slow_client":
                await forever()
            left.set()

    rest = lines()
    stream = EventStream(await anext(rest), rest, on_abort=told.append, send_seconds=0.05)
    async with asyncio.timeout(5):
        await stream({}, receive, send)
    assert told == [reason]
    assert lines.is_closed


async def test_a_slow_engine_is_no_slow_client():
    """The seconds count while a client is not reading, not while the next token is made."""

    async def lines():
        for _ in range(3):
            await asyncio.sleep(0.1)
            yield b"data: 1\n\n"

    async def send(message):
        sent.append(message)

    rest, told, sent = lines(), [], []
    stream = EventStream(await anext(rest), rest, on_abort=told.append, send_seconds=0.02)
    await stream({}, forever, send)
    assert told == []
    assert sent[-1]["more_body"] is False


async def test_a_client_that_leaves_before_the_first_byte_ends_the_work():
    """The generation has begun by then; nothing else would close it."""
    lines, told = Lines(), []
    rest = lines()
    stream = EventStream(await anext(rest), rest, on_abort=told.append)

    async def send(message):
        await forever()

    async with asyncio.timeout(5):
        await stream({}, disconnected, send)
    assert told == ["disconnect"]
    assert lines.is_closed
