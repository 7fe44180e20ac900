"""An OpenAI-compatible server as `offline` uses it: chat completions, many at a time.

Transient refusals are tried again when the server says, others end the run with what the server
said. Knows nothing of questions, answers or judges.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar

import httpx
import msgspec

from probes.errors import HNeuronsError

log = logging.getLogger(__name__)

REQUEST_SECONDS = 300.0
TRANSIENT = (408, 429, 502, 503, 504)  # a slow line, a full queue, a restart
RETRIES = 8  # of one request; an overloaded server says how long to wait, a lost one doubles it

T = TypeVar("T")
R = TypeVar("R")


class ChatError(HNeuronsError):
    """The server refused, failed for good, or did not answer with a chat completion."""


class Choice(msgspec.Struct, frozen=True):
    message: dict[str, object]
    finish_reason: str
    token_ids: tuple[int, ...] = ()
    risk: dict[str, object] | None = None  # of our server, when it was asked for


class Completion(msgspec.Struct, frozen=True):
    """What is needed of a chat completion; other keys are ignored as servers differ in them."""

    choices: tuple[Choice, ...]
    prompt_token_ids: tuple[int, ...] = ()

    @property
    def text(self) -> str | None:
        content = self.choices[0].message.get("content")
        return content if isinstance(content, str) else None


class ChatClient:
    """`async with connect(url, in_flight=32) as client: await client.complete(body, name=...)`."""

    def __init__(self, http: httpx.AsyncClient, model: str) -> None:
        self._http = http
        self.model = model

    async def complete(self, body: dict[str, object], *, name: str) -> Completion:
        """One chat completion; ChatError names `name` and what the server said."""
        said = ""
        for attempt in range(RETRIES):
            wait = min(30.0, 0.5 * 2**attempt)
            try:
                response = await self._http.post(
                    "/v1/chat/completions", json={"model": self.model, **body}
                )
            except httpx.TransportError as exc:
                said = f"{type(exc).__name__}: {exc}"
            else:
                if response.is_success:
                    return _decode(response, name)
                said = f"{response.status_code} {response.text[:300]}"
                if response.status_code not in TRANSIENT:
                    break
                told = response.headers.get("retry-after", "")
                wait = float(told) if told.isdecimal() else wait
            await asyncio.sleep(wait)
        raise ChatError(
            f"{name}: the server said {said}; what it answered so far is kept, run again to go on"
        )


@asynccontextmanager
async def connect(
    base_url: str,
    *,
    in_flight: int,
    api_key: str | None = None,
    model: str | None = None,
    like: str = "",
    trust_env: bool = True,
) -> AsyncIterator[ChatClient]:
    """A client of the server at `base_url` (with or without /v1).

    model      as the server calls it; None: the only one that it serves, or the one called `like`
    trust_env  obey proxy variables; False for a child server, which no proxy can reach
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    root = base_url.rstrip("/").removesuffix("/v1")
    async with httpx.AsyncClient(
        base_url=root,
        headers=headers,
        limits=limits,
        timeout=REQUEST_SECONDS,
        trust_env=trust_env,
    ) as http:
        yield ChatClient(http, model or await _served_model(http, like))


async def at_most(
    in_flight: int, items: Iterable[T], work: Callable[[T], Coroutine[None, None, R]]
) -> AsyncIterator[R]:
    """Results of `work` as they come, never more than `in_flight` under way; the first error ends
    it and cancels the others."""
    waiting = iter(items)
    under_way: set[asyncio.Task[R]] = set()
    try:
        while True:
            while len(under_way) < in_flight:
                try:
                    item = next(waiting)
                except StopIteration:
                    break
                under_way.add(asyncio.create_task(work(item)))
            if not under_way:
                return
            finished, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            # What was answered in the same moment as an error is kept: errors come last.
            for task in sorted(finished, key=lambda task: task.exception() is not None):
                yield task.result()
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


def _decode(response: httpx.Response, name: str) -> Completion:
    try:
        completion = msgspec.json.decode(response.content, type=Completion)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ChatError(f"{name}: not a chat completion: {exc}") from exc
    if not completion.choices:
        raise ChatError(f"{name}: a chat completion without a choice")
    return completion


async def _served_model(http: httpx.AsyncClient, like: str) -> str:
    """ChatError when several are served and none, or `like`, is not among them: whose answers it
    would be is anybody's guess."""
    try:
        response = await http.get("/v1/models")
        response.raise_for_status()
        models = response.json()["data"]
        names: list[str] = [model["id"] for model in models]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as exc:
        raise ChatError(f"{http.base_url} is no OpenAI-compatible server: {exc}") from exc
    if like in names:
        return like
    are_aliases = all(model.get("owned_by") == "hneurons" for model in models)  # our server's
    if not names or (len(names) > 1 and not are_aliases):
        raise ChatError(
            f"{http.base_url} serves {', '.join(names) or 'nothing'}, but no model called "
            f"{like!r}; name the one that is meant (collect: --served-model)"
        )
    log.info("%s calls its model %r; it is taken for %r", http.base_url, names[0], like)
    return names[0]
