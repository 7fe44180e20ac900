"""From what a client may say to what the engine is told: every wire request becomes orders once.

Checks what the schema cannot know: names of models and probes, the vocabulary, the context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from probes.probe import Probe
from server.api.errors import APIError
from server.api.formats import answer_grammar, answer_rules, tool_use
from server.api.prompts import chat_prompt, encode_prompts
from server.api.schemas import (
    ChatRequest,
    CompletionRequest,
    Risk,
    RiskOptions,
)
from server.engines.base import GenerationRequest, Grammar, Sampling
from server.monitor import RiskPlan
from server.policy import Order
from server.service import Service


async def chat_orders(
    service: Service, body: ChatRequest, *, request_id: str, tenant: int = 0
) -> list[Order]:
    """One order per choice; APIError names the field that cannot be served."""
    check_model(service, body.model)
    plan = risk_plan(service, body.risk)
    tools = tool_use(service, body)
    rules = answer_rules(service, tools)
    grammar = await answer_grammar(service, body, tools, rules)
    prompt = await chat_prompt(service, body.messages, tools)
    limit = body.max_completion_tokens or body.max_tokens
    max_tokens = _max_tokens(service, prompt, limit, param="messages")
    _check_budget(service, choices=body.n or 1, max_tokens=max_tokens)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = _sampling(service, body, logprobs=logprobs, grammar=grammar)
    orders = _orders(body, plan, [prompt], [max_tokens], sampling, request_id, tenant)
    _check_room(service, orders, param="n")
    is_named = tools is not None and tools.function is not None
    return [replace(order, rules=rules, is_call_named=is_named) for order in orders]


async def completion_orders(
    service: Service, body: CompletionRequest, *, request_id: str, tenant: int = 0
) -> list[Order]:
    """One order per prompt and choice, prompts first, as OpenAI counts them."""
    check_model(service, body.model)
    plan = risk_plan(service, body.risk)
    prompts = await _prompts(service, body)
    limits = [_max_tokens(service, prompt, body.max_tokens, param="prompt") for prompt in prompts]
    _check_budget(service, choices=len(prompts) * (body.n or 1), max_tokens=max(limits))
    sampling = _sampling(service, body, logprobs=body.logprobs)
    orders = _orders(body, plan, prompts, limits, sampling, request_id, tenant)
    _check_room(service, orders, param="prompt")
    return orders


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
    body: ChatRequest | CompletionRequest,
    plan: RiskPlan | None,
    prompts: Sequence[tuple[int, ...]],
    limits: Sequence[int],
    sampling: Sampling,
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
                sampling=_of_choice(sampling, len(orders)),
                probe=plan.probe.id if plan else None,
                read_last=plan is not None and plan.probe.card.position == "read",
                alpha=plan.alpha if plan else 1.0,
                contributors=plan.contributors if plan else 0,
                tenant=tenant,
            )
            orders.append(Order(request=request, stop=body.stop_strings, plan=plan))
    return orders


def _of_choice(sampling: Sampling, choice: int) -> Sampling:
    """Choices of one request differ by their seeds alone."""
    return replace(sampling, seed=None if sampling.seed is None else sampling.seed + choice)


def _sampling(
    service: Service,
    body: ChatRequest | CompletionRequest,
    *,
    logprobs: int | None,
    grammar: Grammar | None = None,
) -> Sampling:
    """OpenAI's defaults: temperature 1, top_p 1, no penalties."""
    for name, reason in service.engine.card.refused_sampling.items():
        if getattr(body, name):
            message = f"{name} cannot be used with this server: {reason}"
            raise APIError(400, message, param=name)
    return Sampling(
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(body.top_k or 0, 0),
        min_p=_or(body.min_p, 0.0),
        seed=body.seed,
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(service, body.logit_bias or {}),
        logprobs=logprobs,
        ignore_eos=bool(body.ignore_eos),
        grammar=grammar,
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
        raise APIError(
            400, "this server runs without suppression (--suppression): alpha is 1", param=param
        )
    if not probe.suppress.any():
        raise APIError(400, "this probe has no neurons to suppress: alpha is 1", param=param)


async def _prompts(service: Service, body: CompletionRequest) -> list[tuple[int, ...]]:
    """`prompt` in its four shapes, as token ids."""
    match body.prompt:
        case str() as text:
            return await encode_prompts(service, [text])
        case [str(), *_]:
            texts = [text for text in body.prompt if isinstance(text, str)]
            return await encode_prompts(service, texts)
        case [int(), *_]:
            given = [tuple(i for i in body.prompt if isinstance(i, int))]
        case _:
            given = [tuple(ids) for ids in body.prompt if isinstance(ids, list)]
    for ids in given:
        check_token_ids(service, ids, param="prompt")
    return given


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


def _check_room(service: Service, orders: Sequence[Order], *, param: str) -> None:
    """What an idle server could not take either must not be told to come back later."""
    if len(orders) == 1:
        return
    tokens = sum(len(order.request.prompt_token_ids) for order in orders)
    for what, asked, limit in (
        ("prompts times n", len(orders), service.room_for_choices),
        ("prompt tokens of all choices", tokens, service.room_for_prompt_tokens),
    ):
        if limit is not None and asked > limit:
            raise APIError(
                400,
                f"{what} are limited to {limit} per request; this request asks for {asked}",
                param=param,
                code="invalid_value",
            )
