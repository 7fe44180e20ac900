"""Several streams as one: the choices of an answer, written as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Generic, TypeVar

READ_AHEAD = 64  # items of a slower consumer, of all streams together; they are held in memory

_T = TypeVar("_T")


async def merge(
    streams: Sequence[AsyncGenerator[_T, None]], *, silence: float | None
) -> AsyncGenerator[list[tuple[int, _T]], None]:
    """What has come since the last time, with the number of its stream; [] after `silence` seconds.

    What comes together goes on together. The first error ends all streams, after what came before
    it; closing this closes them too.
    """
    inbox: _Inbox[_T] = _Inbox()
    readers = [asyncio.create_task(inbox.read(i, stream)) for i, stream in enumerate(streams)]
    clock = [] if silence is None else [asyncio.create_task(inbox.watch(silence))]
    open_readers = set(readers)
    try:
        while open_readers:
            await inbox.news()
            ended = {reader for reader in open_readers if reader.done()}
            batch = inbox.take()
            if batch or not ended:
                yield batch
            for reader in ended:
                reader.result()
            open_readers -= ended
    finally:
        for task in (*readers, *clock):
            task.cancel()
        await asyncio.gather(*readers, *clock, return_exceptions=True)


class _Inbox(Generic[_T]):
    """What has come and was not taken yet. Tasks per stream, none per item: items are tokens."""

    def __init__(self) -> None:
        self._has_news = False
        self._news: asyncio.Future[None] | None = None  # awaited; an Event costs twice as much
        self._has_room = asyncio.Event()
        self._items: list[tuple[int, _T]] = []
        self._last = 0.0  # when something came

    async def news(self) -> None:
        """Wait until something has come since the last time."""
        if not self._has_news:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        self._has_news = False

    def _tell(self) -> None:
        self._has_news = True
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def take(self) -> list[tuple[int, _T]]:
        items, self._items = self._items, []
        self._has_room.set()
        return items

    async def read(self, number: int, stream: AsyncGenerator[_T, None]) -> None:
        """Everything of one stream, no more than READ_AHEAD items before they are taken."""
        try:
            async with aclosing(stream):
                async for item in stream:
                    self._items.append((number, item))
                    self._last = time.monotonic()
                    self._tell()
                    if len(self._items) >= READ_AHEAD:
                        self._has_room.clear()
                        await self._has_room.wait()
        finally:
            self._tell()

    async def watch(self, silence: float) -> None:
        """Tell when nothing has come for so many seconds, and again after as many more."""
        self._last = time.monotonic()
        while True:
            await asyncio.sleep(max(0.0, self._last + silence - time.monotonic()))
            if time.monotonic() >= self._last + silence:
                self._tell()
                self._last = time.monotonic()
