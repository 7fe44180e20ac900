"""What happens to an answer because of its risk: flag, stop, withhold or retry.

Every policy is a stream of pieces that ends with one `Ending`; a streamed and a whole answer are
made from the same stream and so cannot differ.

    flag      the answer goes out as it is made; its risk is told
    stop      the answer ends with the first flagged token, which is shown (reasoning is not the
              answer: a flag there stops nothing)
    withhold  nothing goes out before the answer is complete; a flagged answer is replaced by a
              fixed sentence and only its risks go out (an answer that could not be scored is not
              flagged: its status says so)
    retry     nothing goes out before the answer is complete; a flagged one is thrown away and made
              once more with alpha (0 when the request sets none), whose answer goes out whatever
              its risk: under alpha the risk is not calibrated, so the two cannot be compared

Knows nothing of the wire.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

from server.detokenizer import Detokenizer
from server.engines.base import Engine, GenerationRequest, Step
from server.monitor import Attempt, Monitor, RiskPlan, RiskSummary, Token, summarise
from server.parsing import Rules
from server.segments import Piece, Segmenter, joined

Ended: TypeAlias = Literal["stop", "length", "content_filter", "tool_calls"]

WITHHELD = "This answer was withheld because its hallucination risk is above the threshold."


@dataclass(frozen=True, kw_only=True)
class Order:
    """One choice: what the engine shall generate and how it is watched."""

    request: GenerationRequest
    stop: tuple[str, ...] = ()
    plan: RiskPlan | None = None
    rules: Rules | None = None  # None: all text is content
    is_call_named: bool = False  # one function must be called: OpenAI ends that with "stop"


class Ending(NamedTuple):
    """The one last event of a choice; its tokens carry no text and did not go out before."""

    finish_reason: Ended
    tokens: tuple[Token, ...]
    completion_tokens: int
    risk: RiskSummary | None


class Observer(NamedTuple):
    """Told of what happens, for metrics."""

    on_step: Callable[[Step], None]
    on_attempt: Callable[[RiskSummary | None, Sequence[Token]], None]  # complete, shown or not
    on_action: Callable[[str], None]  # "stopped", "withheld", "retried"


def answer(
    engine: Engine, order: Order, *, observer: Observer
) -> AsyncGenerator[Piece | Ending, None]:
    """Pieces of one choice, then its `Ending`; whatever the engine raises passes through."""
    policy = order.plan.policy if order.plan is not None else "flag"
    make = _at_once if policy in ("flag", "stop") else _withhold if policy == "withhold" else _retry
    return make(engine, order, observer)


async def _at_once(
    engine: Engine, order: Order, observer: Observer
) -> AsyncGenerator[Piece | Ending, None]:
    prompt, rules, plan = order.request.prompt_token_ids, order.rules, order.plan
    shows_special_tokens = rules is not None and rules.shows_special_tokens
    monitor = Monitor(
        Detokenizer(
            engine.tokenizer,
            prompt,
            shown_but=engine.card.eos_token_ids if shows_special_tokens else None,
        ),
        first_position=len(prompt),
        stop=order.stop,
        plan=plan,
    )
    segmenter = Segmenter(
        rules.open(prompt) if rules is not None else None,
        stops=plan is not None and plan.policy == "stop",
    )
    async with aclosing(engine.generate(order.request)) as steps:
        async for step in steps:
            observer.on_step(step)
            for piece in segmenter.push(monitor.push(step)):
                yield piece
            if monitor.finish_reason is not None or segmenter.is_stopped:
                break
    rest: tuple[Token, ...] = ()
    if not segmenter.is_stopped:
        pieces, rest = segmenter.finish(monitor.finish())
        for piece in pieces:
            yield piece
    finish_reason: Ended | None = monitor.finish_reason
    if segmenter.is_stopped:
        finish_reason = "content_filter"
    elif finish_reason == "stop" and segmenter.has_calls and not order.is_call_named:
        finish_reason = "tool_calls"
    assert finish_reason is not None
    ending = Ending(
        finish_reason,
        rest,
        len(segmenter.tokens),
        summarise(plan, segmenter.tokens) if plan is not None else None,
    )
    observer.on_attempt(ending.risk, segmenter.tokens)
    if segmenter.is_stopped:
        observer.on_action("stopped")
    yield ending


async def _withhold(
    engine: Engine, order: Order, observer: Observer
) -> AsyncGenerator[Piece | Ending, None]:
    pieces, ending = await _complete(engine, order, observer)
    if ending.risk is not None and ending.risk.is_flagged:
        observer.on_action("withheld")
        written = [token for piece in pieces for token in piece.tokens]
        tokens = tuple(_without_text(token) for token in (*written, *ending.tokens))
        yield Piece(WITHHELD, tokens)
        yield ending._replace(
            finish_reason="content_filter", tokens=(), risk=replace(ending.risk, spans=())
        )
        return
    for piece in pieces:
        yield piece
    yield ending


async def _retry(
    engine: Engine, order: Order, observer: Observer
) -> AsyncGenerator[Piece | Ending, None]:
    """The first attempt runs without suppression: its risk is calibrated."""
    assert order.plan is not None
    pieces, ending = await _complete(engine, _with_alpha(order, 1.0), observer)
    assert ending.risk is not None
    attempts = [_attempt(ending.risk)]
    if ending.risk.is_flagged:
        observer.on_action("retried")
        alpha = 0.0 if order.plan.alpha == 1 else order.plan.alpha
        pieces, ending = await _complete(engine, _with_alpha(order, alpha), observer)
        assert ending.risk is not None
        attempts.append(_attempt(ending.risk))
    for piece in pieces:
        yield piece
    assert ending.risk is not None
    yield ending._replace(risk=replace(ending.risk, attempts=tuple(attempts)))


async def _complete(engine: Engine, order: Order, observer: Observer) -> tuple[list[Piece], Ending]:
    pieces: list[Piece] = []
    async with aclosing(_at_once(engine, order, observer)) as events:
        async for event in events:
            if isinstance(event, Ending):
                return joined(pieces), event
            pieces.append(event)
    raise AssertionError("a stream of pieces always ends with an Ending")


def _with_alpha(order: Order, alpha: float) -> Order:
    assert order.plan is not None
    return replace(
        order,
        request=replace(order.request, alpha=alpha),
        plan=replace(order.plan, alpha=alpha),
    )


def _without_text(token: Token) -> Token:
    """The risk alone: an id or a log-probability would give the text away."""
    return token._replace(
        token_id=None, text="", start=0, end=0, logprobs=None, segment="content", call=None
    )


def _attempt(risk: RiskSummary) -> Attempt:
    return Attempt(risk.plan.alpha, risk.score, risk.is_flagged)
