"""From orders to an HTTP response: all choices at once, streamed or whole, from the same events."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import orjson
from fastapi import Request
from starlette.responses import Response

from probes.errors import HNeuronsError
from server.answer_record import AnswerRecord, ChoiceRecord
from server.api.errors import APIError, to_api_error
from server.api.merge import merge
from server.api.objects import Writer, usage
from server.api.schemas import ChatRequest, CompletionRequest
from server.api.sse import DONE, KEEP_ALIVE, ClientGoneError, EventStream, event, unless_gone
from server.api.token_objects import JSON
from server.edge import FAILED
from server.engines.base import EngineOverloadedError, Step
from server.metrics import Metrics
from server.monitor import RiskSummary, Token
from server.policy import Ending, Observer, Order, answer
from server.segments import Piece
from server.service import Service

# Candidates of log-probabilities in a whole answer, 4 us each: more are written down on a thread,
# or every other request would wait for seconds.
ENTRIES_INLINE = 4096
TOKENS_TOLD_AT_ONCE = 16  # each alone would cost the counters' locks


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def record_of(request: Request) -> dict[str, object]:
    """What the request's log line shall say; see `server/edge.py`."""
    record: dict[str, object] = request.scope.get("state", {}).get("record", {})
    return record


def origin_of(request: Request) -> tuple[str, str | None]:
    """`(request id, traceparent)`: how this request is called elsewhere."""
    request_id: str = request.scope.get("state", {}).get("request_id", "")
    return request_id, request.headers.get("traceparent")


def tenant_of(request: Request) -> int:
    """Who asks, by number; see `ApiKeys`."""
    tenant: int = request.scope.get("state", {}).get("tenant", 0)
    return tenant


async def respond(
    request: Request,
    service: Service,
    body: ChatRequest | CompletionRequest,
    *,
    orders: Sequence[Order],
    answer_id: str,
) -> Response:
    """Generate every choice and answer in OpenAI's shape."""
    is_chat = isinstance(body, ChatRequest)
    run = _Run(
        service,
        orders=orders,
        endpoint="chat_completions" if is_chat else "completions",
        prompt_tokens=sum(len(o.request.prompt_token_ids) for o in orders[:: body.n or 1]),
        writer=Writer(
            id=answer_id,
            model=service.model_name,
            created=int(time.time()),
            system_fingerprint=service.system_fingerprint,
            is_chat=is_chat,
            with_token_ids=bool(body.return_token_ids),
            names=service.token_names,
            orders=orders,
        ),
        request=request,
    )
    record = record_of(request)
    try:
        if not body.stream:
            document = await unless_gone(request.receive, run.whole())
            record.update(run.record())
            return Response(document, media_type="application/json")
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        lines = run.lines(with_usage=with_usage, record=record)
        # An error before the first token is still an HTTP status.
        first = await unless_gone(request.receive, _first(lines))
    except ClientGoneError as error:
        service.metrics.request_aborted("disconnect")
        raise APIError(499, "the client closed the connection", code="client_gone") from error
    return EventStream(first, lines, on_abort=service.metrics.request_aborted)


class _Run:
    """One request while it is served."""

    def __init__(
        self,
        service: Service,
        *,
        orders: Sequence[Order],
        endpoint: str,
        prompt_tokens: int,
        writer: Writer,
        request: Request,
    ) -> None:
        self._service = service
        self._request_id, self._traceparent = origin_of(request)
        self._record = record_of(request)
        self._orders = orders
        self._endpoint = endpoint
        self._prompt_tokens = prompt_tokens
        self._writer = writer
        self._started = service.clock()
        self._endings: dict[int, Ending] = {}
        self._paces: list[_Pace] = []
        self._texts: list[list[str]] = [[] for _ in orders]  # only if a recorder keeps text
        service.metrics.request_accepted(endpoint, prompt_tokens=prompt_tokens)

    async def whole(self) -> bytes:
        """The answer in one JSON object."""
        pieces: list[list[Piece]] = [[] for _ in self._orders]
        async with aclosing(self._events(silence=None)) as events:
            async for batch in events:
                for i, item in batch:
                    if isinstance(item, Piece):
                        pieces[i].append(item)
        tokens = sum(ending.completion_tokens for ending in self._endings.values())
        if tokens * (1 + (self._orders[0].request.sampling.logprobs or 0)) < ENTRIES_INLINE:
            return self._document(pieces)
        return await asyncio.to_thread(self._document, pieces)

    def _document(self, pieces: Sequence[Sequence[Piece]]) -> bytes:
        choices = [
            self._writer.choice(i, pieces[i], self._endings[i]) for i in range(len(self._orders))
        ]
        return orjson.dumps(self._writer.body(choices, usage=self._usage()))

    async def lines(
        self, *, with_usage: bool, record: dict[str, object]
    ) -> AsyncGenerator[bytes, None]:
        """The same answer as events, those that come together in one piece.

        What fails after the first one ends in an error event.
        """
        has_begun = False
        try:
            async with aclosing(self._events(silence=self._service.keep_alive_seconds)) as events:
                async for batch in events:
                    chunks = b"".join([self._chunk(i, item) for i, item in batch])
                    if not has_begun:
                        chunks = self._writer.openings() + chunks
                        has_begun = True
                    yield chunks or KEEP_ALIVE
        except HNeuronsError as error:
            if not has_begun:
                raise
            yield event(dict(to_api_error(error).body()))
        else:
            if with_usage:
                yield self._writer.usage(self._usage())
        record.update(self.record())
        yield DONE

    def record(self) -> dict[str, object]:
        """For the log line: counts and words, never text."""
        plan = self._orders[0].plan
        endings = [ending for _, ending in sorted(self._endings.items())]
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": sum(e.completion_tokens for e in endings),
            "finish_reasons": [e.finish_reason for e in endings],
            "probe": plan.probe.id if plan is not None else None,
            "alpha": plan.alpha if plan is not None else None,
            "flagged": [e.risk.is_flagged if e.risk else None for e in endings],
        }

    async def _events(
        self, *, silence: float | None
    ) -> AsyncGenerator[list[tuple[int, Piece | Ending]], None]:
        """Pieces and endings of all choices as they come; [] after `silence` seconds without."""
        metrics = self._service.metrics
        is_refused = False
        streams = [
            answer(self._service.engine, order, observer=self._observer(order))
            for order in self._orders
        ]
        error_code: str | None = "aborted"
        try:
            async with aclosing(merge(streams, silence=silence)) as events:
                async for batch in events:
                    for i, item in batch:
                        self._note(i, item)
                    yield batch
            error_code = None
        except Exception as error:
            error_code = to_api_error(error).code or "unknown"
            # A second attempt may find the queue full, after the first one has written.
            has_written = any(pace.has_begun for pace in self._paces)
            is_refused = isinstance(error, EngineOverloadedError) and not has_written
            if not is_refused:
                self._record[FAILED] = error_code
                metrics.request_failed(error_code)
            raise
        finally:
            for pace in self._paces:
                pace.tell()
            if not is_refused:
                self._service.record(self._answer_record(error_code))
        metrics.request_finished(self._endpoint, seconds=self._service.clock() - self._started)

    def _chunk(self, i: int, item: Piece | Ending) -> bytes:
        if isinstance(item, Piece):
            return self._writer.delta(i, item)
        return self._writer.closing(i, item)

    def _note(self, i: int, event: Piece | Ending) -> None:
        if isinstance(event, Ending):
            self._endings[i] = event
            self._service.metrics.choice_finished(event.finish_reason)
        elif self._service.keeps_text:
            self._texts[i].append(event.text)

    def _answer_record(self, error: str | None) -> AnswerRecord:
        endings = [self._endings.get(i) for i in range(len(self._orders))]
        return AnswerRecord(
            request_id=self._request_id,
            answer_id=self._writer.id,
            endpoint=self._endpoint,
            model=self._service.model_name,
            plan=self._orders[0].plan,
            choices=[
                ChoiceRecord(
                    finish_reason=ending.finish_reason if ending else None,
                    risk=ending.risk if ending else None,
                    text="".join(texts),
                )
                for ending, texts in zip(endings, self._texts, strict=True)
            ],
            prompt_tokens=self._prompt_tokens,
            completion_tokens=sum(ending.completion_tokens for ending in endings if ending),
            seconds=self._service.clock() - self._started,
            error=error,
            traceparent=self._traceparent,
        )

    def _observer(self, order: Order) -> Observer:
        metrics, clock = self._service.metrics, self._service.clock
        probe = order.plan.probe.id if order.plan is not None else ""
        pace = _Pace(metrics, clock, started=self._started)
        self._paces.append(pace)

        def on_attempt(risk: RiskSummary | None, tokens: Sequence[Token]) -> None:
            if risk is not None:
                metrics.response_monitored(risk, tokens)

        def on_action(action: str) -> None:
            metrics.policy_acted(probe, action=action)

        return Observer(pace.on_step, on_attempt, on_action)

    def _usage(self) -> JSON:
        return usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=sum(e.completion_tokens for e in self._endings.values()),
        )


class _Pace:
    """When the tokens of one choice were written; the metrics are told of several at a time."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float], *, started: float) -> None:
        self._metrics, self._clock, self._started = metrics, clock, started
        self._last: float | None = None
        self._gaps: list[float] = []

    @property
    def has_begun(self) -> bool:
        return self._last is not None

    def on_step(self, step: Step) -> None:
        if step.token_id is None:
            return
        now = self._clock()
        if self._last is None:
            self._metrics.first_token(now - self._started)
        else:
            self._gaps.append(now - self._last)
            if len(self._gaps) == TOKENS_TOLD_AT_ONCE:
                self.tell()
        self._last = now

    def tell(self) -> None:
        """What was not told yet; once more at the end, however it came."""
        gaps, self._gaps = self._gaps, []
        self._metrics.next_tokens(gaps)


async def _first(lines: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(lines)
