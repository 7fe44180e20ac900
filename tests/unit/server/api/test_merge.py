"""Streams that are read side by side: nothing lost, nothing late, nothing left open."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import pytest

from server.api.merge import READ_AHEAD, merge


class Stream:
    """Yields `items`, letting the others run in between; raises `error` after them."""

    def __init__(self, *items, error=None, gate=None):
        self.items, self.error, self.gate, self.is_closed = items, error, gate, False

    async def __call__(self):
        try:
            for item in self.items:
                await asyncio.sleep(0)
                yield item
            if self.gate is not None:
                await self.gate.wait()
            if self.error is not None:
                raise self.error
        finally:
            self.is_closed = True


async def everything(*streams: Stream, silence: float | None = None):
    return [batch async for batch in merge([stream() for stream in streams], silence=silence)]


async def test_items_of_a_stream_keep_their_order_and_their_number():
    batches = await everything(Stream("a", "b"), Stream(), Stream("c"))
    items = [item for batch in batches for item in batch]
    assert [item for item in items if item[0] == 0] == [(0, "a"), (0, "b")]
    assert sorted(items) == [(0, "a"), (0, "b"), (2, "c")]


async def test_what_comes_while_nobody_reads_comes_together():
    """A slow client costs one write, not one per token."""
    batches = []
    async for batch in merge([Stream("a", "b", "c", "d")()], silence=None):
        batches.append([item for _, item in batch])
        for _ in range(10):
            await asyncio.sleep(0)
    assert batches == [["a"], ["b", "c", "d"]]


async def test_a_client_that_does_not_read_holds_up_the_work():
    """R29: otherwise an answer of megabytes waits in memory for nobody."""
    made = []

    async def endless():
        while True:
            made.append(len(made))
            yield made[-1]
            await asyncio.sleep(0)

    async with aclosing(merge([endless()], silence=None)) as merged:
        first = await anext(merged)
        for _ in range(3 * READ_AHEAD):
            await asyncio.sleep(0)
        assert len(made) == len(first) + READ_AHEAD
        assert len(await anext(merged)) == READ_AHEAD


async def test_silence_is_told_and_ends():
    gate = asyncio.Event()
    seen = []
    async with asyncio.timeout(5):
        async for batch in merge([Stream("a", gate=gate)()], silence=0.01):
            seen.append(batch)
            if batch == []:
                gate.set()
    assert seen[:2] == [[(0, "a")], []]


async def test_silence_is_told_after_the_promised_time_and_not_twice_as_late():
    """Prevents: a proxy that allows 20 seconds, and a comment that comes after 30 instead of 15."""
    gate = asyncio.Event()

    async def late():
        await asyncio.sleep(0.05)  # just after the watch has begun
        yield "a"
        await gate.wait()

    spoken = silent = 0.0
    async with asyncio.timeout(5):
        async for batch in merge([late()], silence=0.4):
            if batch:
                spoken = time.monotonic()
            else:
                silent = time.monotonic()
                gate.set()
    assert 0.4 <= silent - spoken < 0.7


async def test_an_error_comes_after_what_came_before_it_and_closes_the_others():
    waiting = Stream("a", gate=asyncio.Event())
    failing = Stream("b", error=ValueError("broken"))
    seen = []

    async def consume():
        async for batch in merge([waiting(), failing()], silence=None):
            seen.extend(batch)

    with pytest.raises(ValueError, match="broken"):
        await consume()
    assert sorted(seen) == [(0, "a"), (1, "b")]
    assert waiting.is_closed


async def test_closing_it_closes_every_stream():
    """I5: a client that leaves ends the work of all choices."""
    streams = [Stream(i, gate=asyncio.Event()) for i in range(3)]
    async with aclosing(merge([stream() for stream in streams], silence=None)) as merged:
        await anext(merged)
    assert all(stream.is_closed for stream in streams)
