"""What the engine's thread has made, on its way to the event loops that wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeAlias

from server.engines.base import EngineDeadError, RequestFailedError
from server.engines.row import Outcome, Row

QUEUE_STEPS = 256  # a reader that falls this far behind is given up

Item: TypeAlias = Outcome | EngineDeadError


class Stream:
    """Where the outcomes of one row wait for their reader; lives on the event loop."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Item] = asyncio.Queue()

    def put(self, item: Item) -> None:
        """Keep `item`, or give the reader up when it is too far behind."""
        if self.row.aborted:
            return
        if self.queue.qsize() >= QUEUE_STEPS:
            self.row.aborted = True
            item = RequestFailedError(
                "slow_client",
                f"{QUEUE_STEPS} steps wait to be read; the request was aborted, read faster",
            )
        self.queue.put_nowait(item)


def deliver(items: Sequence[tuple[Stream, Item]]) -> None:
    for stream, item in items:
        stream.put(item)
