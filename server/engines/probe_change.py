"""Other probes for a running engine, and who waits until they are read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from probes.probe import Probe
from probes.tap import Meter
from server.engines.base import EngineDeadError


class ProbeChange:
    """Made on the event loop, ended by the engine's thread."""

    def __init__(
        self, probes: tuple[Probe, ...], meter: Meter, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.probes, self.meter, self.loop = probes, meter, loop
        self.done: asyncio.Future[None] = loop.create_future()

    def succeed(self) -> None:
        self._tell(lambda: self.done.set_result(None))

    def fail(self, error: EngineDeadError) -> None:
        self._tell(lambda: self.done.set_exception(error))

    def _tell(self, end: Callable[[], None]) -> None:
        """Nothing when nobody waits any more: cancelled, or with its loop gone."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(lambda: None if self.done.done() else end())
