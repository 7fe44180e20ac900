"""The server process: from an open socket to an exit code.

First SIGTERM or SIGINT: draining. `/readyz` and new requests get a 503 while the listener stays
open for the drain delay, open requests may finish until the drain timeout, the rest are told why
they end; exit 0. Second signal: out within two seconds. A dead or hung engine: the open requests
are told, exit 4. uvicorn alone would close the listener at once and cut the streams.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from probes.errors import HNeuronsError
from server.api.errors import RETRY_AFTER_UNAVAILABLE, APIError, to_api_error
from server.engines.base import EngineDeadError
from server.lifecycle import Gate, Lifecycle, Phase

EXIT_FORCED = 1
EXIT_ENGINE_DEAD = 4
SECONDS_FOR_LAST_WORDS = 2.0
SECONDS_AFTER_SECOND_SIGNAL = 1.5

log = logging.getLogger(__name__)


class ListenError(HNeuronsError):
    """The address cannot be listened on."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a taken port shows before the model loads."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        raise ListenError(_why(error, f"{host}:{port}")) from error
    return bound


def _why(error: Exception, address: str) -> str:
    reason = getattr(error, "strerror", None) or "not a host name"
    return f"cannot listen on {address}: {reason}; choose another --host or --port"


@contextmanager
def handling_signals() -> Iterator[None]:
    """What signals mean until the listener, with its own handlers, is there. SIGTERM ends the
    process: as the first one of a container it would ignore it, and be ready minutes later. SIGHUP
    asks for what is being loaded anyway. All are put back at the end."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class Listener(uvicorn.Server):
    """A uvicorn server that leaves the process's signals alone."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; ListenError when another process was faster."""
        try:
            await super().startup(sockets)
        except OSError as error:
            raise ListenError(_why(error, f"{self.config.host}:{self.config.port}")) from error


class Server(Listener):
    """The main listener; `exit_code` is set when `serve` returns."""

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        lifecycle: Lifecycle,
        gate: Gate,
        drain_delay: float,
        drain_timeout: float,
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._lifecycle = lifecycle
        self._gate = gate
        self._drain_delay = drain_delay
        self._drain_timeout = drain_timeout
        self._on_ready = on_ready
        self._signals = 0
        self._stop_listening_at = self._stop_serving_at = float("inf")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Like uvicorn's, but the signal is not raised again at the end: the exit code is ours. The
        handlers stay: what follows, the end of the engine, is not to be cut short by another."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Runs between two bytecodes of the main thread: only notes what on_tick acts upon."""
        self._signals += 1
        if self._signals == 1:
            now = time.monotonic()
            # A person at the keyboard has no load balancer that must hear of it first.
            self._stop_listening_at = now + (self._drain_delay if sig == signal.SIGTERM else 0)
            self._stop_serving_at = self._stop_listening_at + self._drain_timeout
            self._lifecycle.begin_draining()
        else:
            self.force_exit = True
            self._stop_listening_at = self._stop_serving_at = 0.0
            timer = threading.Timer(SECONDS_AFTER_SECOND_SIGNAL, os._exit, args=(EXIT_FORCED,))
            timer.daemon = True
            timer.start()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._lifecycle.begin_serving()
        self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; True leaves the main loop for `shutdown`."""
        return (
            await super().on_tick(counter)
            or self._lifecycle.phase is Phase.DEAD
            or time.monotonic() >= self._stop_listening_at
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, let the open requests finish, tell the others, close."""
        log.info("stopping", extra={"open_requests": self._gate.open_requests})
        for server in self.servers:
            server.close()
        while self._gate.open_requests and self._may_go_on():
            await asyncio.sleep(0.05)
        if self._lifecycle.phase is Phase.DEAD:
            log.critical("engine dead", extra={"reason": self._lifecycle.reason})
            self.exit_code = EXIT_ENGINE_DEAD
            # Open streams hear it from the engine itself; this is for those it cannot tell.
            await asyncio.sleep(0.2)
            self._gate.end_all(to_api_error(EngineDeadError(self._lifecycle.reason)))
        elif self._gate.open_requests:
            log.warning("ending requests", extra={"open_requests": self._gate.open_requests})
            self._gate.end_all(
                APIError(
                    503,
                    "the server is shutting down; send the request again",
                    code="shutdown",
                    retry_after=RETRY_AFTER_UNAVAILABLE,
                )
            )
        if self.force_exit:
            self.exit_code = EXIT_FORCED
        await super().shutdown(sockets)

    def _may_go_on(self) -> bool:
        return self._lifecycle.phase is not Phase.DEAD and time.monotonic() < self._stop_serving_at
