"""Verb `collect`: ask the questions of an OpenAI-compatible server, keep text and token ids.

questions -> answers.jsonl. Many requests in flight; each answer is on disk before the next one
counts; a second run asks only what is missing. Ids come from the server (`return_token_ids`), as
our server and vLLM give them, and are never made from the text.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from offline.chat_client import ChatClient, at_most, connect
from offline.child_server import child_server
from offline.models import LoadedTokenizer, load_tokenizer, short_name
from offline.questions import Question
from offline.records import (
    Answer,
    Appender,
    Header,
    RecordError,
    read_records,
    sort_records,
    versions,
)
from probes.errors import HNeuronsError

log = logging.getLogger(__name__)

KEPT = ("question", "prompt", "gold", "group", "split")  # of a question in each of its answers


class CollectError(HNeuronsError):
    """The server does not return token ids."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn."""

    samples: int = 1
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    max_tokens: int | None = None  # of a question with accepted answers; None: by its style
    seed: int = 0


PAPER = Sampling(samples=10, temperature=1.0, top_p=0.9, top_k=50, max_tokens=50)


def sampling(paper: bool, **given: float | None) -> Sampling:
    """The paper's way to draw or the greedy one, with what is `given` put in its place."""
    said = {key: value for key, value in given.items() if value is not None}
    return replace(PAPER if paper else Sampling(), **said)  # type: ignore[arg-type]


class Ask(NamedTuple):
    """One request."""

    question: Question
    sample: int


def missing(
    questions: Sequence[Question], path: Path, *, header: Header, samples: int
) -> list[Ask]:
    """What is to be asked that `path` does not hold yet; repairs the tail of a killed run.

    RecordError when `path` holds a question of `questions` otherwise than it stands there now.
    """
    with Appender(path, header):
        answers = read_records(path, Answer)[1]
    _check_unchanged(questions, answers, path)
    done = {answer.id for answer in answers}
    asks = every_ask(questions, samples)
    return [ask for ask in asks if f"{ask.question.id}/{ask.sample}" not in done]


def every_ask(questions: Sequence[Question], samples: int) -> list[Ask]:
    """What a finished run has asked. Ordinary prose is asked once: it is not right or wrong."""
    return [
        Ask(question, sample)
        for question in questions
        for sample in range(samples if question.gold else 1)
    ]


def _check_unchanged(questions: Sequence[Question], answers: Sequence[Answer], path: Path) -> None:
    """Later verbs take a question from its answers: one that was edited meanwhile is refused, one
    that is not asked any more is told of, since a run may ask its files one by one."""
    question_of = {question.id: question for question in questions}
    others: set[str] = set()
    for answer in answers:
        question = question_of.get(answer.question_id)
        if question is None:
            others.add(answer.question_id)
            continue
        for field in KEPT:
            then, now = getattr(answer, field), getattr(question, field)
            if then != now:
                raise RecordError(
                    f"{path}: question {question.id!r} was asked with {field} {then!r}, and now "
                    f"has {now!r}; choose another --out folder, or delete its lines there to ask "
                    f"it again"
                )
    if others:
        log.warning(
            "%s also holds the answers to %d questions that are not asked now, such as %r; they "
            "count, unless their lines are deleted there",
            *(path, len(others), min(others)),
        )


def ask_all(
    model: str,
    out: Path,
    asked: Sequence[Question],
    sampling: Sampling,
    *,
    base_url: str | None,
    served_model: str | None,
    revision: str | None,
    in_flight: int,
    model_dtype: str,
    api_key: str | None,
) -> None:
    """Write `out`/answers.jsonl: what it lacks is asked of `base_url`, or of a child server."""
    tokenizer = load_tokenizer(model, revision=revision)
    header = answers_header(
        short_name(model),
        tokenizer=tokenizer,
        sampling=sampling,
        libraries=versions(),
    )
    path = out / "answers.jsonl"
    asks = missing(asked, path, header=header, samples=sampling.samples)
    if asks:
        server = child_server(model, revision=revision, dtype=model_dtype, in_flight=in_flight)
        with nullcontext(base_url) if base_url else server as url:
            asyncio.run(
                collect(
                    asks,
                    path,
                    base_url=url,
                    served_model=served_model,
                    header=header,
                    sampling=sampling,
                    in_flight=in_flight,
                    done=len(every_ask(asked, sampling.samples)) - len(asks),
                    api_key=api_key,
                    trust_env=bool(base_url),
                )
            )
    sort_records(path, Answer)


async def collect(
    asks: Sequence[Ask],
    path: Path,
    *,
    base_url: str,
    header: Header,
    sampling: Sampling,
    in_flight: int,
    served_model: str | None = None,
    done: int = 0,
    api_key: str | None = None,
    trust_env: bool = True,
) -> None:
    """Append an answer to `path` for each of `asks`, in the order in which they come.

    ChatError or CollectError on the first request that fails for good; what was answered before
    stays. `done` answers are there already: the bar starts with them.
    """
    with Appender(path, header) as out:
        async with connect(
            base_url,
            in_flight=in_flight,
            api_key=api_key,
            model=served_model,
            like=header.model_id,
            trust_env=trust_env,
        ) as client:
            with tqdm(total=done + len(asks), initial=done, unit="answer", desc="collect") as bar:
                async for answer in at_most(
                    in_flight, asks, lambda ask: _answer(client, ask, sampling)
                ):
                    out.append(answer)
                    bar.update()


def answers_header(
    model_id: str,
    *,
    tokenizer: LoadedTokenizer,
    sampling: Sampling,
    libraries: dict[str, str],
) -> Header:
    """Header of answers.jsonl. Which questions were asked is no setting: a run may ask more."""
    return Header(
        kind="answers",
        model_id=model_id,
        model_revision=tokenizer.revision,
        tokenizer_sha256=tokenizer.tokenizer_sha256,
        chat_template_sha256=tokenizer.chat_template_sha256,
        settings={key: str(value) for key, value in asdict(sampling).items() if value is not None},
        libraries=libraries,
    )


async def _answer(client: ChatClient, ask: Ask, sampling: Sampling) -> Answer:
    question, sample = ask
    name = f"question {question.id!r}"
    body: dict[str, object] = {
        "messages": [{"role": "user", "content": question.prompt}],
        "max_tokens": (question.gold and sampling.max_tokens) or question.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": _seed(question.id, sample, sampling.seed),
        "return_token_ids": True,
    }
    if sampling.top_k:
        body["top_k"] = sampling.top_k
    reply = await client.complete(body, name=name)
    choice = reply.choices[0]
    if reply.text is None or not reply.prompt_token_ids or not choice.token_ids:
        raise CollectError(
            f"{name}: the server returned no token ids or no text; collecting needs "
            f"`return_token_ids`, which our server and vLLM >= 0.10.2 support"
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
        text=reply.text,
        finish_reason=choice.finish_reason,
    )


def _seed(question_id: str, sample: int, seed: int) -> int:
    """Own seed per sample, independent of order and resumption."""
    digest = hashlib.sha256(f"{seed}/{question_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
