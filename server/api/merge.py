"""Several streams as one: the choices of an answer, written as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

_T = TypeVar("_T")


async def merge(
    streams: Sequence[AsyncGenerator[_T, None]], *, silence: float | None
) -> AsyncGenerator[list[tuple[int, _T]], None]:
    """What has come since the last time, with the number of its stream; [] after `silence` seconds.

    One task per stream, not one per item, reads ahead of a consumer that is slower: what comes
    together goes on together. The first error ends all streams, after what came before it; closing
    this closes them too.
    """
    arrived: list[tuple[int, _T]] = []
    has_news = asyncio.Event()

    async def read(number: int, stream: AsyncGenerator[_T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    arrived.append((number, item))
                    has_news.set()
        finally:
            has_news.set()

    readers = [asyncio.create_task(read(i, stream)) for i, stream in enumerate(streams)]
    open_readers = set(readers)
    try:
        while open_readers:
            try:
                async with asyncio.timeout(silence):
                    await has_news.wait()
            except TimeoutError:
                yield []
                continue
            has_news.clear()
            ended = {reader for reader in open_readers if reader.done()}
            if arrived:
                batch, arrived[:] = list(arrived), []
                yield batch
            for reader in ended:
                reader.result()
            open_readers -= ended
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
