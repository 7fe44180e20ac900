"""`POST /v1/risk`: the risk of a text that is already there; nothing is generated."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from server.answer_record import AnswerRecord, ChoiceRecord
from server.api.answers import ScoredText, documented
from server.api.errors import APIError, to_api_error
from server.api.generation import new_id, origin_of, record_of, tenant_of
from server.api.orders import check_context, check_model, check_token_ids, risk_plan
from server.api.prompts import chat_prompt, encode_prompts, encode_with_spans
from server.api.schemas import ScoreTextRequest
from server.api.sse import ClientGoneError, unless_gone
from server.api.token_objects import risk_summary
from server.detokenizer import Detokenizer
from server.edge import FAILED
from server.engines.base import EngineOverloadedError, Reading, ScoreRequest
from server.monitor import RiskPlan, RiskSummary, Token, score, summarise
from server.service import Service

router = APIRouter(tags=["risk"])


@dataclass(frozen=True)
class _Given:
    """A prompt, and the tokens of the text after it with the characters they carry."""

    prompt: tuple[int, ...]
    tokens: tuple[Token, ...]


@router.post("/v1/risk", responses=documented(ScoredText))
async def score_text(body: ScoreTextRequest, request: Request) -> Response:
    """Read a given answer, or any text after any prompt, as if the model had written it."""
    service: Service = request.app.state.service
    started = service.clock()
    check_model(service, body.model or service.model_name)
    plan = risk_plan(service, True if body.risk is None else body.risk)
    if plan is None:
        raise APIError(400, "this route does nothing without risk", param="risk")
    if plan.policy != "flag":
        raise APIError(
            400, "only the policy flag has a meaning for given text", param="risk.policy"
        )
    given = await _given(service, body)
    check_context(service, len(given.prompt) + len(given.tokens), param=_text_field(body))
    answer_id = new_id("risk")
    order = ScoreRequest(
        request_id=answer_id,
        token_ids=(*given.prompt, *(t.token_id for t in given.tokens if t.token_id is not None)),
        start=len(given.prompt),
        probe=plan.probe.id,
        alpha=plan.alpha,
        contributors=plan.contributors,
        tenant=tenant_of(request),
    )
    service.metrics.request_accepted("risk", prompt_tokens=len(given.prompt))
    summary: RiskSummary | None = None
    error_code: str | None = "aborted"
    try:
        readings = await unless_gone(request.receive, service.engine.score(order))
        # On a thread, as its answer: a long text would stop every stream for a second.
        tokens, risk = await asyncio.to_thread(_judged, plan, given, readings)
        summary = risk
        error_code = None
    except ClientGoneError as error:
        service.metrics.request_aborted("disconnect")
        raise APIError(499, "the client closed the connection", code="client_gone") from error
    except EngineOverloadedError:
        error_code = "overloaded"
        raise  # refused, not failed
    except Exception as error:
        error_code = to_api_error(error).code or "unknown"
        record_of(request)[FAILED] = error_code
        service.metrics.request_failed(error_code)
        raise
    finally:
        if error_code != "overloaded":
            request_id, traceparent = origin_of(request)
            service.record(
                AnswerRecord(
                    request_id=request_id,
                    answer_id=answer_id,
                    endpoint="risk",
                    model=service.model_name,
                    plan=plan,
                    choices=[ChoiceRecord(finish_reason=None, risk=summary, text="")],
                    prompt_tokens=len(given.prompt),
                    completion_tokens=0,
                    seconds=service.clock() - started,
                    error=error_code,
                    traceparent=traceparent,
                )
            )
    await asyncio.to_thread(service.metrics.response_monitored, risk, tokens)
    service.metrics.request_finished("risk", seconds=service.clock() - started)
    record_of(request).update(
        prompt_tokens=len(given.prompt),
        scored_text_tokens=len(tokens),
        probe=plan.probe.id,
        alpha=plan.alpha,
        flagged=[risk.is_flagged],
    )
    return await asyncio.to_thread(_answer, service, answer_id, given, tokens, risk)


def _answer(
    service: Service, answer_id: str, given: _Given, tokens: Sequence[Token], risk: RiskSummary
) -> Response:
    document: dict[str, Any] = {
        "id": answer_id,
        "object": "risk",
        "created": int(time.time()),
        "model": service.model_name,
        "usage": {
            "prompt_tokens": len(given.prompt),
            "scored_tokens": sum(token.risk is not None for token in tokens),
        },
        "risk": risk_summary(risk, tokens),
    }
    return Response(orjson.dumps(document), media_type="application/json")


async def _given(service: Service, body: ScoreTextRequest) -> _Given:
    if body.prompt_token_ids is not None and body.token_ids is not None:
        check_token_ids(service, body.prompt_token_ids, param="prompt_token_ids")
        check_token_ids(service, body.token_ids, param="token_ids")
        return _Given(
            tuple(body.prompt_token_ids), await asyncio.to_thread(_detokenised, service, body)
        )
    if body.messages is not None:
        prompt = await chat_prompt(service, body.messages)
    else:
        (prompt,) = await encode_prompts(service, [body.prompt or ""])
    text = body.answer or body.text or ""
    tokens = [
        Token(token_id, text[start:end], start, end)
        for token_id, start, end in await encode_with_spans(service, text)
    ]
    return _Given(prompt, tuple(tokens))


def _detokenised(service: Service, body: ScoreTextRequest) -> tuple[Token, ...]:
    detokenizer = Detokenizer(service.engine.tokenizer, body.prompt_token_ids or ())
    tokens: list[Token] = []
    for token_id in body.token_ids or ():
        text = detokenizer.push(token_id)
        start = tokens[-1].end if tokens else 0
        tokens.append(Token(token_id, text, start, start + len(text)))
    return tuple(tokens)


def _judged(
    plan: RiskPlan, given: _Given, readings: Sequence[Reading]
) -> tuple[list[Token], RiskSummary]:
    tokens = _scored(plan, given, readings)
    return tokens, summarise(plan, tokens)


def _scored(plan: RiskPlan, given: _Given, readings: Sequence[Reading]) -> list[Token]:
    """Each token with its reading: that of its own position, or of the one before (`write`)."""
    lag = 0 if plan.probe.card.position == "read" else 1
    by_position = {reading.position + lag: reading for reading in readings}
    scored = []
    for position, token in enumerate(given.tokens, start=len(given.prompt)):
        reading = by_position.get(position)
        scored.append(
            token._replace(unscored="not_read") if reading is None else score(plan, token, reading)
        )
    return scored


def _text_field(body: ScoreTextRequest) -> str:
    return next(name for name in ("answer", "text", "token_ids") if getattr(body, name) is not None)
