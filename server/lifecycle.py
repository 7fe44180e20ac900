"""Is the service starting, ready, draining or dead, and which requests are open meanwhile.

One `Lifecycle` per process. The gate refuses `/v1/*` unless the service is ready, and can end the
open requests with one last word: an error event in a stream, an error body before one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum

import orjson
from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import RETRY_AFTER_UNAVAILABLE, APIError, to_api_error
from server.engines.base import EngineDeadError, Health


class Phase(StrEnum):
    STARTING = "starting"  # the model loads, the known-answer tests run
    READY = "ready"
    DRAINING = "draining"  # told to stop: open requests finish, new ones go elsewhere
    DEAD = "dead"  # the engine died or hangs; there is no way back


class Lifecycle:
    """The phase, as `/readyz` shows it; looks at the engine each time it is asked.

    health     the engine's cheap look at itself
    heartbeat  seconds without a step, with work to do, that mean the engine hangs
    """

    def __init__(self, *, health: Callable[[], Health], heartbeat: float) -> None:
        self._health = health
        self._heartbeat = heartbeat
        self._phase = Phase.STARTING
        self.reason = ""

    @property
    def phase(self) -> Phase:
        if self._phase is not Phase.DEAD:
            self._look_at_engine()
        return self._phase

    def begin_serving(self) -> None:
        """The known-answer tests have passed and the listener accepts."""
        if self._phase is Phase.STARTING:
            self._phase = Phase.READY

    def begin_draining(self) -> None:
        if self.phase is not Phase.DEAD:
            self._phase = Phase.DRAINING

    def refusal(self) -> APIError | None:
        """Why a new request cannot be served now; None when it can."""
        match self.phase:
            case Phase.READY:
                return None
            case Phase.DEAD:
                return to_api_error(EngineDeadError(self.reason))
            case phase:
                return APIError(
                    503,
                    f"the server is {phase}; try again later or on another replica",
                    code=phase.value,
                    retry_after=RETRY_AFTER_UNAVAILABLE,
                    headers={"connection": "close"},  # or a pooled client would come here again
                )

    def _look_at_engine(self) -> None:
        health = self._health()
        is_hung = health.seconds_since_step > self._heartbeat and health.running + health.waiting
        if not health.alive:
            self._phase, self.reason = Phase.DEAD, health.reason or "the engine died"
        elif is_hung:
            self._phase = Phase.DEAD
            self.reason = f"no step for more than {self._heartbeat:g} s with requests to serve"


class Gate:
    """Admits requests to `/v1/*` while the service is ready and keeps track of the open ones."""

    def __init__(self, app: ASGIApp, *, lifecycle: Lifecycle) -> None:
        self.app = app
        self.lifecycle = lifecycle
        self._open: set[asyncio.Timeout] = set()
        self._last_word: APIError | None = None

    @property
    def open_requests(self) -> int:
        return len(self._open)

    def open_now(self) -> frozenset[object]:
        """A token of each open request, to see later whether it is still there."""
        return frozenset(self._open)

    def end_all(self, last_word: APIError) -> None:
        """Cancel every open request; each of them is told `last_word`."""
        self._last_word = last_word
        for deadline in self._open:
            deadline.reschedule(asyncio.get_running_loop().time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not get_route_path(scope).startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        if (refusal := self.lifecycle.refusal()) is not None:
            await refusal.response()(scope, receive, send)
            return
        response = _Response(scope, receive, send)
        try:
            async with asyncio.timeout(None) as deadline:  # only `end_all` makes it expire
                self._open.add(deadline)
                await self.app(scope, receive, response.send)
        except TimeoutError:
            if not deadline.expired() or self._last_word is None:
                raise
            await response.end(self._last_word)
        except Exception as error:
            await response.end(to_api_error(error))
            raise
        finally:
            self._open.discard(deadline)


class _Response:
    """Remembers how far an answer got, so that it can be ended as its client expects."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._connection = (scope, receive, send)
        self._is_stream = self._has_begun = self._is_complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_begun = True
            self._is_stream = any(
                name == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
        elif not message.get("more_body", False):
            self._is_complete = True
        await self._connection[2](message)

    async def end(self, error: APIError) -> None:
        """A response of its own, or the last events of a stream; a cut JSON body stays cut."""
        scope, receive, send = self._connection
        if not self._has_begun:
            await error.response()(scope, receive, send)
        elif self._is_stream and not self._is_complete:
            event = b"data: " + orjson.dumps(error.body()) + b"\n\ndata: [DONE]\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": False})
