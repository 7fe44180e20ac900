"""Verb `collect`: ask the questions of an OpenAI-compatible server, keep text and token ids.

questions -> answers.jsonl. Many requests in flight; each answer is on disk before the next one
counts; a second run asks only what is missing. Ids come from the server (`return_token_ids`), as
our server and vLLM give them, and are never made from the text.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
from tqdm import tqdm

from offline.questions import Question
from offline.records import Answer, Appender, Header, read_records
from probes.errors import HNeuronsError

log = logging.getLogger(__name__)

REQUEST_SECONDS = 300.0
TRANSIENT = (408, 429, 502, 503, 504)  # a slow line, a full queue, a restart
RETRIES = 8  # of one request; an overloaded server says how long to wait, a lost one doubles it


class CollectError(HNeuronsError):
    """The server refused, failed for good, or does not return token ids."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn. The paper: ten samples at 1.0, top_p .9, top_k 50."""

    samples: int = 1
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    seed: int = 0


class Ask(NamedTuple):
    """One request."""

    question: Question
    sample: int


class _Choice(msgspec.Struct, frozen=True):
    message: dict[str, object]
    finish_reason: str
    token_ids: tuple[int, ...] = ()


class _Reply(msgspec.Struct, frozen=True):
    """What is needed of a chat completion; other keys are ignored as servers differ in them."""

    choices: tuple[_Choice, ...]
    prompt_token_ids: tuple[int, ...] = ()


def missing(
    questions: Sequence[Question], path: Path, *, header: Header, samples: int
) -> list[Ask]:
    """What is to be asked that `path` does not hold yet; repairs the tail of a killed run."""
    with Appender(path, header):
        done = {answer.id for answer in read_records(path, Answer)[1]}
    return [
        Ask(question, sample)
        for question in questions
        for sample in range(samples)
        if f"{question.id}/{sample}" not in done
    ]


async def collect(
    asks: Sequence[Ask],
    path: Path,
    *,
    base_url: str,
    header: Header,
    sampling: Sampling,
    in_flight: int,
    api_key: str | None = None,
) -> None:
    """Append an answer to `path` for each of `asks`, in the order in which they come.

    CollectError on the first request that fails for good; what was answered before stays.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    with Appender(path, header) as out:
        async with httpx.AsyncClient(
            base_url=base_url, headers=headers, limits=limits, timeout=REQUEST_SECONDS
        ) as client:
            model = await _served_model(client)
            with tqdm(total=len(asks), unit="answer", desc="collect") as bar:
                async for answer in _answers(client, model, asks, sampling, in_flight):
                    out.append(answer)
                    bar.update()


def answers_header(
    model_id: str,
    *,
    tokenizer_sha256: str,
    chat_template_sha256: str,
    sampling: Sampling,
    libraries: dict[str, str],
) -> Header:
    """Header of answers.jsonl. Which questions were asked is no setting: a run may ask more."""
    return Header(
        kind="answers",
        model_id=model_id,
        tokenizer_sha256=tokenizer_sha256,
        chat_template_sha256=chat_template_sha256,
        settings={key: str(value) for key, value in asdict(sampling).items()},
        libraries=libraries,
    )


async def _answers(
    client: httpx.AsyncClient,
    model: str,
    asks: Sequence[Ask],
    sampling: Sampling,
    in_flight: int,
) -> AsyncIterator[Answer]:
    """Answers as they come; at most `in_flight` requests are open."""
    waiting = iter(asks)
    open_requests: set[asyncio.Task[Answer]] = set()
    try:
        while True:
            while len(open_requests) < in_flight and (ask := next(waiting, None)) is not None:
                open_requests.add(asyncio.create_task(_ask(client, model, *ask, sampling)))
            if not open_requests:
                return
            finished, open_requests = await asyncio.wait(
                open_requests, return_when=asyncio.FIRST_COMPLETED
            )
            for task in finished:
                yield task.result()
    finally:
        for task in open_requests:
            task.cancel()
        await asyncio.gather(*open_requests, return_exceptions=True)


async def _ask(
    client: httpx.AsyncClient, model: str, question: Question, sample: int, sampling: Sampling
) -> Answer:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question.prompt}],
        "max_tokens": question.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": _seed(question.id, sample, sampling.seed),
        "return_token_ids": True,
    }
    if sampling.top_k:
        body["top_k"] = sampling.top_k
    response = await _post(client, body, question.id)
    try:
        reply = msgspec.json.decode(response.content, type=_Reply)
        choice = reply.choices[0]
        text = choice.message["content"]
    except (msgspec.DecodeError, IndexError, KeyError) as exc:
        raise CollectError(f"question {question.id!r}: not a chat completion: {exc}") from exc
    if not isinstance(text, str) or not reply.prompt_token_ids or not choice.token_ids:
        raise CollectError(
            f"question {question.id!r}: the server returned no token ids or no text; collecting "
            f"needs `return_token_ids`, which our server and vLLM >= 0.10.2 support"
        )
    return Answer(
        id=f"{question.id}/{sample}",
        source=question.source,
        style=question.style,
        group=question.group,
        question=question.question,
        prompt=question.prompt,
        gold=question.gold,
        split=question.split,
        prompt_token_ids=reply.prompt_token_ids,
        token_ids=choice.token_ids,
        text=text,
        finish_reason=choice.finish_reason,
    )


async def _post(client: httpx.AsyncClient, body: dict[str, object], name: str) -> httpx.Response:
    """One chat completion; a transient refusal is tried again when the server says, or later."""
    said = ""
    for attempt in range(RETRIES):
        try:
            response = await client.post("/v1/chat/completions", json=body)
        except httpx.TransportError as exc:
            said, wait = f"{type(exc).__name__}: {exc}", min(30.0, 0.5 * 2**attempt)
        else:
            if response.is_success:
                return response
            said = f"{response.status_code} {response.text[:300]}"
            if response.status_code not in TRANSIENT:
                break
            told = response.headers.get("retry-after", "")
            wait = float(told) if told.isdecimal() else min(30.0, 0.5 * 2**attempt)
        await asyncio.sleep(wait)
    raise CollectError(
        f"question {name!r}: the server said {said}; answers so far are kept, run again to go on"
    )


async def _served_model(client: httpx.AsyncClient) -> str:
    """The name under which the server serves its (first) model."""
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        name: str = response.json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, LookupError) as exc:
        raise CollectError(f"{client.base_url} is no OpenAI-compatible server: {exc}") from exc
    return name


def _seed(question_id: str, sample: int, seed: int) -> int:
    """Own seed per sample, independent of order and resumption."""
    digest = hashlib.sha256(f"{seed}/{question_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
