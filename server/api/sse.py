"""Server-sent events, and what happens when nobody listens any more.

Only `data:` lines and comments: clients break on other event names. A client that leaves ends the
work at once, streamed or not: `unless_gone` races the work against the disconnect.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
SEND_SECONDS = 30.0  # without progress: the client has stopped reading

_T = TypeVar("_T")


class ClientGoneError(Exception):
    """The client left; nobody will read an answer."""


def event(data: dict[str, Any]) -> bytes:
    """One event; the caller has made sure that every float is finite."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled with ClientGoneError when the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream(Response):
    """Sends `first`, then what `rest` yields; closes `rest`, and so the engine's work, in any case.

    first, rest  one stream of lines, whose beginning was awaited to learn its HTTP status
    on_abort  told "disconnect" or "slow_client" when the stream ends because of its client
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes, None],
        *,
        on_abort: Callable[[str], None],
        send_seconds: float = SEND_SECONDS,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._on_abort = on_abort
        self._send_seconds = send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            try:
                await unless_gone(receive, self._write(send))
            except ClientGoneError:
                self._on_abort("disconnect")

    async def _write(self, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        patience = _Patience(self._send_seconds)
        try:
            async with patience.watching():
                with patience:
                    await send(start)
                    await send(_body(self._first))
                async for line in self._rest:
                    with patience:
                        await send(_body(line))
        except _SlowClientError:
            self._on_abort("slow_client")
            return  # unfinished: the server closes the connection
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _SlowClientError(Exception):
    """The client does not read; its socket is full."""


class _Patience:
    """Limits the seconds inside its `with` blocks, of which there is one per token.

    `asyncio.timeout` around each of them took a tenth of the server's time per token: instead one
    task looks now and then how long the block that is open has been open.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None  # when the open block began

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """_SlowClientError out of a block that is open longer, by up to a quarter."""
        deadline = asyncio.timeout(None)
        watch = asyncio.create_task(self._watch(deadline))
        try:
            async with deadline:
                yield
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise _SlowClientError from error
        finally:
            watch.cancel()

    async def _watch(self, deadline: asyncio.Timeout) -> None:
        while True:
            await asyncio.sleep(self._seconds / 4)
            if self._since is not None and time.monotonic() - self._since > self._seconds:
                deadline.reschedule(asyncio.get_running_loop().time())
                return


def _body(line: bytes) -> Message:
    return {"type": "http.response.body", "body": line, "more_body": True}


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
