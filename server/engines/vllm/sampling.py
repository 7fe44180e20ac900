"""Our words for sampling into vLLM's, and vLLM's outputs into ours."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from server.engines.base import FinishReason, Grammar, RequestFailedError, Sampling, TokenLogprobs
from server.engines.vllm.plan import EXTRA_ARGS_KEY, Order

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine import FinishReason as VllmFinishReason


def sampling_params(
    sampling: Sampling, order: Order | None, *, ends: Sequence[int]
) -> SamplingParams:
    """Of one request, whose `max_tokens` the caller sets.

    order  rides along to the workers
    ends   token ids that end an answer
    """
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=None if sampling.seed is None else sampling.seed % 2**63,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        logprobs=sampling.logprobs,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=[] if sampling.ignore_eos else list(ends),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=None if order is None else {EXTRA_ARGS_KEY: list(order)},
        structured_outputs=structured_outputs(sampling.grammar),
        skip_clone=True,
    )


def structured_outputs(grammar: Grammar | None) -> StructuredOutputsParams | None:
    """The kinds of grammars are vLLM's."""
    return None if grammar is None else StructuredOutputsParams(**{grammar.kind: grammar.text})


def finish_reason(reason: VllmFinishReason | None) -> FinishReason | None:
    """RequestFailedError where vLLM gave the request up."""
    if reason is None:
        return None
    known: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
    if str(reason) not in known:
        raise RequestFailedError("engine_error", f"vLLM ended the request with {str(reason)!r}")
    return known[str(reason)]


def token_logprobs(
    output: EngineCoreOutput, index: int, sampling: Sampling
) -> TokenLogprobs | None:
    """Of the token at `index` of `output`; None when they were not asked for."""
    if sampling.logprobs is None:
        return None
    assert output.new_logprobs is not None
    # The sampled token, then the best ones, best first: as many as any request of the step wants.
    token_ids = output.new_logprobs.logprob_token_ids[index].tolist()
    logprobs = output.new_logprobs.logprobs[index].tolist()
    best = zip(token_ids[1:], logprobs[1:], strict=True)
    return TokenLogprobs(logprobs[0], tuple(itertools.islice(best, sampling.logprobs)))
