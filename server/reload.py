"""SIGHUP: read the probes' folders again and change over, or keep the old ones and say why.

A new probe is read, matched and tested through the production path beside the old one; only then it
is offered. A request keeps the probe it began with. What is refused changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from probes.errors import HNeuronsError, ProbeError
from probes.fingerprint import match
from probes.probe import Probe
from server.engines.base import ReloadingEngine
from server.known_answer import check_probes
from server.service import Service

SECONDS_BETWEEN_LOOKS = 0.5  # whether the last request of an old probe has ended

log = logging.getLogger(__name__)


class Reload:
    """One change at a time.

    find      names the folders, the default probe's first
    open_now  tokens of the open requests
    """

    def __init__(
        self,
        service: Service,
        *,
        find: Callable[[], Sequence[Path]],
        open_now: Callable[[], frozenset[object]],
    ) -> None:
        self._service = service
        self._find = find
        self._open_now = open_now
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def request(self) -> None:
        """Begin, from a signal handler of the event loop."""
        task = asyncio.create_task(self.run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up what has not ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def run(self) -> None:
        """Change over and count it; never raises for a probe that does not fit."""
        metrics, engine = self._service.metrics, self._service.engine
        async with self._lock:
            before = [probe.id for probe in engine.probes]
            try:
                if not isinstance(engine, ReloadingEngine):
                    raise ProbeError(
                        "this engine reads its probes only at start; roll the replicas"
                    )
                probes = await asyncio.to_thread(self._load)
                await self._try(engine, probes)
            except Exception as error:  # whatever it is, the old probes go on
                if not isinstance(error, HNeuronsError):
                    log.exception("probe reload failed")
                metrics.probes_reloaded("rejected")
                log.error("probe reload rejected", extra={"reason": " ".join(str(error).split())})
                return
            engine.offer(probes)
            metrics.probes_reloaded("loaded")
            metrics.show_probes(probes)
            after = [probe.id for probe in probes]
            log.info("probes reloaded", extra={"before": before, "after": after})
            begun = self._open_now()
            while begun & self._open_now():
                await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            await engine.detach()

    def _load(self) -> list[Probe]:
        probes = [Probe.load(path) for path in self._find()]
        names = [probe.card.name for probe in probes]
        if not probes or len(set(names)) != len(names):
            raise ProbeError(f"a reload needs at least one probe, and one name for each: {names}")
        return probes

    async def _try(self, engine: ReloadingEngine, probes: Sequence[Probe]) -> None:
        """Attached, matched and tested, or as it was."""
        for probe in probes:
            match(probe, engine.card.identity)
        await engine.attach(probes)
        try:
            await check_probes(engine, probes, suppression=self._service.suppression)
        except Exception:
            await engine.detach()
            raise
