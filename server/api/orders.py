"""From what a client may say to what the engine is told: every wire request becomes orders once.

Checks what the schema cannot know: names of models and probes, the vocabulary, the context.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from jinja2 import TemplateError

from probes.probe import Probe
from server.api.errors import APIError
from server.api.schemas import (
    ChatRequest,
    CompletionRequest,
    Message,
    Risk,
    RiskOptions,
)
from server.engines.base import GenerationRequest, Sampling
from server.monitor import RiskPlan
from server.policy import Order
from server.service import Service

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
_INLINE_CHARACTERS = 16_384  # longer texts are tokenised on a thread, off the event loop


async def chat_orders(
    service: Service, body: ChatRequest, *, request_id: str, tenant: int = 0
) -> list[Order]:
    """One order per choice; APIError names the field that cannot be served."""
    check_model(service, body.model)
    plan = risk_plan(service, body.risk)
    prompt = await chat_prompt(service, body.messages)
    limit = body.max_completion_tokens or body.max_tokens
    max_tokens = _max_tokens(service, prompt, limit, param="messages")
    _check_budget(service, choices=body.n or 1, max_tokens=max_tokens)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _orders(service, body, plan, [prompt], [max_tokens], logprobs, request_id, tenant)


async def completion_orders(
    service: Service, body: CompletionRequest, *, request_id: str, tenant: int = 0
) -> list[Order]:
    """One order per prompt and choice, prompts first, as OpenAI counts them."""
    check_model(service, body.model)
    plan = risk_plan(service, body.risk)
    prompts = [await _prompt(service, prompt) for prompt in _prompts(body)]
    limits = [_max_tokens(service, prompt, body.max_tokens, param="prompt") for prompt in prompts]
    _check_budget(service, choices=len(prompts) * (body.n or 1), max_tokens=max(limits))
    return _orders(service, body, plan, prompts, limits, body.logprobs, request_id, tenant)


def check_model(service: Service, name: str) -> None:
    if name not in service.served_names:
        raise APIError(
            404,
            f"no such model; this server has {', '.join(service.served_names)}",
            param="model",
            code="model_not_found",
        )


def risk_plan(service: Service, risk: Risk | None) -> RiskPlan | None:
    """None when no risk is asked for; an unknown or missing probe is refused."""
    if risk is None:
        risk = service.risk_by_default and service.default_probe is not None
    if risk is False:
        return None
    options = RiskOptions.model_validate({}) if risk is True else risk
    probe = _probe(service, options)
    if options.alpha != 1 or options.policy == "retry":
        _check_suppression(service, probe, options)
    token, response = (
        next(point for point in rule.operating_points if point.name == rule.default)
        for rule in (probe.card.token, probe.card.response)
    )
    given = options.threshold
    return RiskPlan(
        probe=probe,
        alpha=float(options.alpha),
        token_threshold=_or(given, token.threshold),
        response_threshold=_or(given, response.threshold),
        operating_point=response.name if given is None else None,
        contributors=options.contributors,
        with_tokens=options.tokens,
        policy=options.policy,
    )


async def chat_prompt(service: Service, messages: Sequence[Message]) -> tuple[int, ...]:
    """The conversation in the model's own template, up to where its answer begins."""
    tokenizer = service.engine.tokenizer
    if tokenizer.chat_template is None:
        raise APIError(400, "this model has no chat template; use /v1/completions")
    turns = [_turn(message) for message in messages]
    length = sum(len(message.text) for message in messages)
    try:
        text = await _aside(length, lambda: _render(tokenizer, turns))
    except TemplateError as error:
        # The sentence is the template author's; it tells which order of roles the model takes.
        raise APIError(
            400,
            f"the model's chat template refuses these messages: {error.message or 'no reason'}",
            param="messages",
            code="chat_template_error",
        ) from error
    return await _encode(service, text, special_tokens=False)


async def encode_prompt(service: Service, text: str) -> tuple[int, ...]:
    """A plain prompt, begun as the model begins a text; at least one token."""
    ids = await _encode(service, text, special_tokens=True)
    if not ids:
        raise APIError(400, "the prompt is empty", param="prompt", code="invalid_value")
    return ids


async def encode_with_spans(service: Service, text: str) -> list[tuple[int, int, int]]:
    """(token id, start, end) of a text without special tokens; offsets are code points of `text`.

    As in generation, the characters of a split one belong to the token that completes it.
    """
    tokenizer = service.engine.tokenizer
    encoding = await _aside(
        len(text),
        lambda: tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        ),
    )
    ends = [end for _, end in encoding["offset_mapping"]]
    spans: list[tuple[int, int, int]] = []
    start = 0
    for i, token_id in enumerate(encoding["input_ids"]):
        following = encoding["offset_mapping"][i + 1][0] if i + 1 < len(ends) else len(text)
        end = max(start, min(ends[i], following))
        spans.append((token_id, start, end))
        start = end
    return spans


def check_token_ids(service: Service, ids: Sequence[int], *, param: str) -> None:
    if max(ids) >= service.engine.card.vocab_size:
        raise APIError(
            400,
            f"token ids are below {service.engine.card.vocab_size}",
            param=param,
            code="invalid_value",
        )


def check_context(service: Service, tokens: int, *, param: str) -> None:
    """`tokens` must fit the model's context, prompt and answer together."""
    limit = service.engine.card.max_model_len
    if tokens > limit:
        raise APIError(
            400,
            f"this model's context holds {limit} tokens; the request needs {tokens}",
            param=param,
            code="context_length_exceeded",
        )


def _orders(
    service: Service,
    body: ChatRequest | CompletionRequest,
    plan: RiskPlan | None,
    prompts: Sequence[tuple[int, ...]],
    limits: Sequence[int],
    logprobs: int | None,
    request_id: str,
    tenant: int,
) -> list[Order]:
    orders: list[Order] = []
    for prompt, max_tokens in zip(prompts, limits, strict=True):
        for _ in range(body.n or 1):
            request = GenerationRequest(
                request_id=f"{request_id}-{len(orders)}",
                prompt_token_ids=prompt,
                max_tokens=max_tokens,
                sampling=_sampling(service, body, logprobs=logprobs, choice=len(orders)),
                probe=plan.probe.id if plan else None,
                read_last=plan is not None and plan.probe.card.position == "read",
                alpha=plan.alpha if plan else 1.0,
                contributors=plan.contributors if plan else 0,
                tenant=tenant,
            )
            orders.append(Order(request=request, stop=body.stop_strings, plan=plan))
    return orders


def _sampling(
    service: Service, body: ChatRequest | CompletionRequest, *, logprobs: int | None, choice: int
) -> Sampling:
    """OpenAI's defaults: temperature 1, top_p 1, no penalties."""
    return Sampling(
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(body.top_k or 0, 0),
        min_p=_or(body.min_p, 0.0),
        seed=None if body.seed is None else body.seed + choice,
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(service, body.logit_bias or {}),
        logprobs=logprobs,
        ignore_eos=bool(body.ignore_eos),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _logit_bias(service: Service, bias: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    pairs = tuple((int(token_id), float(value)) for token_id, value in bias.items())
    if pairs:
        check_token_ids(service, [token_id for token_id, _ in pairs], param="logit_bias")
    return pairs


def _probe(service: Service, options: RiskOptions) -> Probe:
    name = options.probe or service.default_probe
    if name is None:
        raise APIError(400, "this server runs without a probe and cannot tell a risk", param="risk")
    probe = service.probe(name)
    if probe is None:
        names = ", ".join(probe.card.name for probe in service.engine.probes) or "none"
        raise APIError(
            404,
            f"no such probe; this server has {names}",
            param="risk.probe",
            code="probe_not_found",
        )
    return probe


def _check_suppression(service: Service, probe: Probe, options: RiskOptions) -> None:
    param = "risk.alpha" if options.alpha != 1 else "risk.policy"
    if not service.suppression:
        raise APIError(400, "this server runs without suppression: alpha is 1", param=param)
    if not probe.suppress.any():
        raise APIError(400, "this probe has no neurons to suppress: alpha is 1", param=param)


def _turn(message: Message) -> dict[str, str]:
    role = "system" if message.role == "developer" else message.role
    name = {"name": message.name} if message.name is not None else {}
    return {"role": role, "content": message.text, **name}


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def _prompts(body: CompletionRequest) -> Sequence[str | list[int]]:
    """`prompt` in its four shapes, as a list of prompts."""
    match body.prompt:
        case str() as text:
            return [text]
        case [int(), *_]:
            return [[i for i in body.prompt if isinstance(i, int)]]
        case prompts:
            return [prompt for prompt in prompts if not isinstance(prompt, int)]


async def _prompt(service: Service, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return await encode_prompt(service, prompt)
    check_token_ids(service, prompt, param="prompt")
    return tuple(prompt)


def _max_tokens(service: Service, prompt: Sequence[int], limit: int | None, *, param: str) -> int:
    """What was asked for if it fits; else as much as fits, up to the server's default."""
    room = service.engine.card.max_model_len - len(prompt)
    if limit is None:
        check_context(service, len(prompt) + 1, param=param)
        return min(room, service.default_max_tokens)
    check_context(service, len(prompt) + limit, param=param if room < 1 else "max_tokens")
    return limit


def _check_budget(service: Service, *, choices: int, max_tokens: int) -> None:
    if choices * max_tokens > service.max_total_tokens:
        raise APIError(
            400,
            f"choices times max_tokens is limited to {service.max_total_tokens} per request; "
            f"this request asks for {choices * max_tokens}",
            param="max_tokens",
            code="invalid_value",
        )


async def _encode(service: Service, text: str, *, special_tokens: bool) -> tuple[int, ...]:
    tokenizer = service.engine.tokenizer
    return await _aside(
        len(text),
        lambda: tuple(tokenizer(text, add_special_tokens=special_tokens, verbose=False).input_ids),
    )


async def _aside(length: int, work: Callable[[], _T]) -> _T:
    """Long texts on a thread: megabytes would stop the event loop for seconds."""
    return await asyncio.to_thread(work) if length > _INLINE_CHARACTERS else work()
