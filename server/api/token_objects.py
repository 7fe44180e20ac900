"""Risks and log-probabilities as JSON: what OpenAI's objects carry of a token.

Every float in here is finite by construction: risks come from the monitor, which turns anything
else into "not scored", and log-probabilities are clipped (JSON writers turn NaN into null, which is
our "not scored", without a word).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from server.detokenizer import TokenNames
from server.engines.base import RequestFailedError
from server.monitor import RiskPlan, RiskSummary, Span, Token

JSON: TypeAlias = dict[str, Any]
_LOWEST_LOGPROB = -9999.0  # what vLLM writes for minus infinity


def risk_entries(tokens: Sequence[Token], plan: RiskPlan) -> list[JSON]:
    """`risk.tokens`: one entry per written token, nothing when the request does not want them.

    `segment` is the field that offsets point into, `tool_call_index` which of the calls.
    """
    if not plan.with_tokens:
        return []
    entries = []
    for token in tokens:
        entry: JSON = {
            "token": token.text,
            "token_id": token.token_id,
            "start": token.start,
            "end": token.end,
            "risk": token.risk,
            "segment": token.segment,
        }
        if token.call is not None:
            entry["tool_call_index"] = token.call
        if plan.contributors:
            entry["contributors"] = [share._asdict() for share in token.contributions]
        entries.append(entry)
    return entries


def risk_summary(risk: RiskSummary, tokens: Sequence[Token]) -> JSON:
    """`choices[].risk`; `tokens` are those whose entries have not been sent before."""
    plan = risk.plan
    summary: JSON = {
        "status": risk.status,
        "reason": risk.reason,
        "probe": plan.probe.id,
        "position": plan.probe.card.position,
        "score": risk.score,
        "flagged": risk.is_flagged,
        "threshold": plan.response_threshold,
        "token_threshold": plan.token_threshold,
        "operating_point": plan.operating_point,
        "alpha": plan.alpha,
        "calibrated": plan.is_calibrated,
        "policy": plan.policy,
        "spans": [_span(span) for span in risk.spans],
        "unscored": risk.unscored,
        "tokens": risk_entries(tokens, plan),
    }
    if risk.attempts:
        summary["attempts"] = [
            {
                "alpha": attempt.alpha,
                "score": attempt.score,
                "flagged": attempt.is_flagged,
                "returned": number == len(risk.attempts),
            }
            for number, attempt in enumerate(risk.attempts, start=1)
        ]
    return summary


def _span(span: Span) -> JSON:
    entry: JSON = {
        "start": span.start,
        "end": span.end,
        "text": span.text,
        "risk": span.risk,
        "segment": span.segment,
    }
    return entry if span.call is None else entry | {"tool_call_index": span.call}


def chat_logprobs(tokens: Sequence[Token], names: TokenNames, *, with_risk: bool) -> JSON | None:
    """`choices[].logprobs` of a chat; None for tokens without log-probabilities (withheld)."""
    content = []
    for token in tokens:
        if token.logprobs is None or token.token_id is None:
            continue
        entry = _chat_logprob(names, token.token_id, token.logprobs.logprob)
        entry["top_logprobs"] = [
            _chat_logprob(names, token_id, logprob) for token_id, logprob in token.logprobs.top
        ]
        if with_risk:
            entry["risk"] = token.risk
        content.append(entry)
    return {"content": content, "refusal": None} if content else None


def text_logprobs(tokens: Sequence[Token], names: TokenNames) -> JSON | None:
    """`choices[].logprobs` of a plain completion; offsets are code points of the completion."""
    rows = [
        (token, token.token_id, token.logprobs)
        for token in tokens
        if token.logprobs is not None and token.token_id is not None
    ]
    if not rows:
        return None
    return {
        "tokens": [names.text(token_id) for _, token_id, _ in rows],
        "token_logprobs": [_finite(logprobs.logprob) for _, _, logprobs in rows],
        "top_logprobs": [
            {names.text(token_id): _finite(logprob) for token_id, logprob in logprobs.top}
            for _, _, logprobs in rows
        ],
        "text_offset": [token.start for token, _, _ in rows],
    }


def _chat_logprob(names: TokenNames, token_id: int, logprob: float) -> JSON:
    return {
        "token": names.text(token_id),
        "bytes": list(names.utf8(token_id)),
        "logprob": _finite(logprob),
    }


def _finite(logprob: float) -> float:
    if math.isnan(logprob):
        raise RequestFailedError("nonfinite_logits", "a log-probability is not a number")
    return max(logprob, _LOWEST_LOGPROB)
