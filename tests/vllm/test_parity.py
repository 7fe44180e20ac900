"""vLLM's readings are those of the teacher-forced reference: compiled, mixed and squeezed.

One engine: chunks of 64 tokens, and so few blocks of keys and values that running requests have to
give theirs up. What is asked of it is what the transformers engine is asked in tests/contract.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import pytest
import pytest_asyncio
import torch

from server.engines.base import (
    EngineDeadError,
    EngineOverloadedError,
    GenerationRequest,
    Sampling,
    Step,
)
from tests.contract.oracle import (
    LIMIT,
    VOCAB,
    all_tokens,
    families,
    make_requests,
    random_prompts,
)
from tests.vllm.served import ALPHAS, Served, mixed_requests, requests_that_fill_blocks

pytestmark = pytest.mark.asyncio(loop_scope="module")

BLOCKS = 16  # of 32 tokens each: prompt and answer of one request may be 511 tokens
SQUEEZED = f"--max-num-batched-tokens 64 --block-size 32 --num-gpu-blocks-override {BLOCKS + 1}"
TEXT = random_prompts()[2] * 3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llama(start_engine, make_model) -> AsyncIterator[Served]:
    """A float32 Llama, compiled by Inductor."""
    folder, reference, probes = make_model(families(128, head_dim=32)["llama"], "float32")
    options = {"max_num_seqs": 32, "max_waiting_requests": 300, "vllm_args": SQUEEZED}
    engine = start_engine(folder, probes, **options)
    yield Served(engine, reference, probes)
    await engine.aclose()


async def test_the_graph_is_compiled(llama):
    """Every peer that reads neurons of vLLM switches compiling off; this one must not."""
    compilation = llama.engine._llm.vllm_config.compilation_config
    assert compilation.mode.name in ("DYNAMO_TRACE_ONCE", "VLLM_COMPILE")
    assert compilation.backend == "inductor"


async def test_two_hundred_mixed_requests_read_what_the_reference_reads(llama):
    """A row, position, chunk, block, alpha or probe that is mistaken anywhere.

    Of those that are left in the middle nothing stays.
    """
    requests = mixed_requests(200, TEXT, lengths=(5, 17, 40, 90, 300), tokens=40)
    assert await llama.worst(requests, leaving=requests[::10]) <= LIMIT["float32"]
    health = llama.engine.health()
    assert (health.running, health.waiting, llama.engine._tap.readers) == (0, 0, {})


async def test_a_prompt_that_is_read_in_chunks_shows_that_the_engine_lives(llama, monkeypatch):
    """A prompt that took longer than --heartbeat to read, alone, was a hang: every client lost."""
    tap, steps = llama.engine._tap, []
    get_output = tap._get_output

    async def counted():
        outputs = await get_output()
        steps.append(len(outputs.outputs))
        return outputs

    monkeypatch.setattr(tap, "_get_output", counted)
    request = GenerationRequest(
        request_id="long", prompt_token_ids=tuple(TEXT[:300]), max_tokens=2, tenant=77
    )
    await llama.generate(request)
    # Four chunks of 64 before the one that writes; the first may have been awaited by another.
    assert steps.index(1) >= 3, steps


@pytest.mark.parametrize("mutant", ["row order swapped", "stale readings", "stale doses"])
async def test_a_broken_mechanism_turns_the_same_check_red(llama, mutant):
    """What never fails proves nothing."""
    requests = mixed_requests(40, TEXT, lengths=(5, 17, 40), tokens=20)
    assert await llama.worst(requests) <= LIMIT["float32"]
    await llama.inside("mutate", mutant)
    try:
        with pytest.raises(AssertionError):
            assert await llama.worst(requests) <= LIMIT["float32"]
    finally:
        await llama.inside("heal")
    assert await llama.worst(requests) <= LIMIT["float32"]


async def test_a_missing_hidden_step_turns_it_red(llama, monkeypatch):
    """The readings lack the last token's then."""
    requests = mixed_requests(40, TEXT, lengths=(5, 17, 40), tokens=20)
    generate = llama.engine.generate

    def without_it(request: GenerationRequest) -> AsyncGenerator[Step, None]:
        return generate(replace(request, read_last=False))

    monkeypatch.setattr(llama.engine, "generate", without_it)
    with pytest.raises(AssertionError):
        await llama.worst(requests)


async def test_greedy_tokens_are_those_of_the_reference(llama):
    """I6 and I7: neither the meter nor alpha 1 beside alpha 0 changes what is written."""
    requests = [
        replace(request, sampling=Sampling(temperature=0, ignore_eos=True), alpha=alpha)
        for request, alpha in zip(make_requests(random_prompts(), 8), ALPHAS * 3, strict=False)
    ]
    served = await asyncio.gather(*map(llama.generate, requests))
    for request, steps in zip(requests, served, strict=True):
        tokens = all_tokens(request, steps)
        if request.alpha == 1:
            with torch.inference_mode():
                logits = llama.reference.model(torch.tensor([tokens])).logits[0]
            first = len(request.prompt_token_ids)
            assert list(tokens[first:]) == logits[first - 1 : -1].argmax(-1).tolist()
        bare = replace(request, probe=None, alpha=1.0, read_last=False)
        if request.alpha == 1:
            unread = await llama.generate(bare)
            assert [step.token_id for step in unread] == list(tokens[first:])
            assert all(step.reading is None for step in unread)


async def test_running_requests_give_up_their_blocks_and_lose_no_reading(llama):
    """Preemption: each fills one block, and there is none free when they all need the next."""
    requests = requests_that_fill_blocks(BLOCKS, symbols=120)
    before = await llama.inside("resumed")
    assert await llama.worst(requests) <= LIMIT["float32"]
    assert await llama.inside("resumed") > before, "nothing was preempted"


async def test_a_shared_prefix_is_cached_and_alpha_does_not_leak_through_it(llama, monkeypatch):
    """I4, with its negative control: without the salt, keys of alpha 2 serve alpha 1."""
    prompt = tuple(3 + (i * 11) % 120 for i in range(200))
    plain = GenerationRequest(
        request_id="p",
        prompt_token_ids=prompt,
        max_tokens=6,
        sampling=Sampling(temperature=0, ignore_eos=True),
        probe="one",
        read_last=True,
    )
    amplified = replace(plain, alpha=2.0)
    for request in (amplified, plain, amplified, plain):
        cached = llama.engine.health().cached_tokens_total
        assert await llama.worst([request]) <= LIMIT["float32"]
    assert llama.engine.health().cached_tokens_total - cached >= 64
    cached = llama.engine.health().cached_tokens_total
    await llama.generate(replace(plain, tenant=1))
    assert llama.engine.health().cached_tokens_total == cached, "another tenant's prompt was found"
    await llama.generate(replace(plain, tenant=1))
    assert llama.engine.health().cached_tokens_total > cached
    monkeypatch.setattr("server.engines.vllm.engine.salt", lambda *_, **__: None)
    other = tuple(3 + (i * 13) % 120 for i in range(200))
    await llama.generate(replace(amplified, prompt_token_ids=other))
    with_leak = await llama.generate(replace(plain, prompt_token_ids=other))
    expected = llama.reference.logits(other, llama.probes[0], 1.0)[-1]
    assert float((torch.tensor(with_leak[0].reading.logits) - expected).abs().max()) > 0.01


async def test_the_last_token_of_a_length_finish_is_read_by_a_hidden_step(llama):
    """Without it the last word of every long answer has no risk; with it no token is added."""
    request = make_requests(random_prompts(), 5)[1]
    request = replace(request, sampling=Sampling(temperature=0, ignore_eos=True), alpha=1.0)
    with_it = await llama.generate(replace(request, read_last=True))
    without = await llama.generate(replace(request, read_last=False))
    assert [step.token_id for step in with_it] == [*(s.token_id for s in without), None]
    assert with_it[-1].finish_reason == without[-1].finish_reason == "length"
    assert with_it[-1].reading.position == len(request.prompt_token_ids) + len(without) - 1
    full = replace(request, prompt_token_ids=tuple(range(3, 103)) * 5, max_tokens=11)
    steps = await llama.generate(replace(full, read_last=True))
    assert len(steps) == 12, "the context is full, and still the last token is read"


async def test_contributions_are_the_largest_shares_of_the_logit(llama):
    """They must be those of the same row and token."""
    await llama.check_contributions()


async def test_log_probabilities_are_those_of_the_model(llama):
    """Of the written token and of the best ones, before temperature."""
    request = GenerationRequest(
        request_id="l",
        prompt_token_ids=(5, 6, 7, 8),
        max_tokens=4,
        sampling=Sampling(temperature=0.7, seed=3, logprobs=3, ignore_eos=True),
    )
    steps = await llama.generate(request)
    tokens = all_tokens(request, steps)
    with torch.inference_mode():
        expected = llama.reference.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    for position, step in enumerate(steps, start=3):
        assert step.logprobs.logprob == pytest.approx(
            float(expected[position, step.token_id]), abs=1e-3
        )
        best = expected[position].topk(3).indices.tolist()
        assert [token for token, _ in step.logprobs.top] == best


async def test_the_queue_is_bounded(llama, monkeypatch):
    """The excess is told at once, before anything started."""
    monkeypatch.setattr(llama.engine, "_max_num_seqs", 1)
    monkeypatch.setattr(llama.engine, "_max_waiting_requests", 0)
    request = make_requests(random_prompts(), 5)[1]
    async with aclosing(llama.engine.generate(replace(request, max_tokens=100))) as running:
        await anext(running)
        with pytest.raises(EngineOverloadedError, match="waiting already"):
            await llama.generate(request)
    assert llama.engine.health().running == 0


@pytest.mark.parametrize("wrong", [{"alpha": -1.0}, {"probe": None}, {"probe": "third"}])
async def test_what_must_be_checked_above_is_refused_and_does_not_kill(llama, wrong):
    """A bug above the seam must not reach the engine's process."""
    request = replace(make_requests(random_prompts(), 5)[1], alpha=0.5)
    with pytest.raises(ValueError, match=r"alpha|probe"):
        await llama.generate(replace(request, **wrong))
    with pytest.raises(ValueError, match="do not fit"):
        await llama.generate(replace(request, prompt_token_ids=(5,) * 511))
    with pytest.raises(ValueError, match="vocabulary"):
        await llama.generate(replace(request, prompt_token_ids=(5, VOCAB)))


async def test_closing_ends_open_streams_with_a_sentence(llama):
    """Last, for it ends the engine: streams hear of it and no process stays."""
    import psutil

    children = psutil.Process().children(recursive=True)
    assert children
    request = replace(make_requests(random_prompts(), 5)[1], max_tokens=300)
    stream = llama.engine.generate(request)
    await anext(stream)
    await llama.engine.aclose()
    with pytest.raises(EngineDeadError, match="closed"):
        async for _ in stream:
            pass
    assert not llama.engine.health().alive
    with pytest.raises(EngineDeadError, match="closed"):
        await llama.generate(request)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
