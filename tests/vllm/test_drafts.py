"""Speculative decoding: several tokens of a request stand in one pass.

A reading belongs to its token whether the draft before it stood or not; of rejected drafts none is
given. The same squeezed engine as in `test_parity.py`, the same oracle.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import torch

from server.engines.base import GenerationRequest, Sampling
from tests.contract.oracle import LIMIT, all_tokens, families, random_prompts
from tests.vllm.served import Served, mixed_requests, requests_that_fill_blocks

pytestmark = pytest.mark.asyncio(loop_scope="module")

BLOCKS = 16  # of 32 tokens each
DRAFTS = {  # method -> what vLLM is told; a model drafts for itself: nearly every draft stands
    "ngram": {"prompt_lookup_min": 1, "prompt_lookup_max": 3},
    "draft_model": {"model": ""},  # its folder
}
SQUEEZED = f"--max-num-batched-tokens 192 --block-size 32 --num-gpu-blocks-override {BLOCKS + 1}"
TEXT = random_prompts()[2][:40] * 20  # repeats itself, so that there are drafts


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=list(DRAFTS))
async def llama(request, start_engine, make_model) -> AsyncIterator[Served]:
    folder, reference, probes = make_model(families(128, head_dim=32)["llama"], "float32")
    drafts = {"method": request.param, "num_speculative_tokens": 3, **DRAFTS[request.param]}
    if "model" in drafts:
        drafts["model"] = str(folder)
    options = {
        "max_num_seqs": 32,
        "max_waiting_requests": 300,
        "vllm_args": f"{SQUEEZED} --speculative-config {shlex.quote(json.dumps(drafts))}",
    }
    engine = start_engine(folder, probes, **options)
    yield Served(engine, reference, probes)
    await engine.aclose()


@pytest.fixture
def tokens_at_once(monkeypatch) -> list[int]:
    """How many new tokens each output of vLLM has had."""
    from server.engines.vllm.tap import Reader

    take, found = Reader.take, []

    def noting(reader, output, numbers):
        found.append(len(output.new_token_ids))
        take(reader, output, numbers)

    monkeypatch.setattr(Reader, "take", noting)
    return found


async def test_mixed_requests_read_what_the_reference_reads(llama, tokens_at_once):
    """A reading too many, too few or of a draft that did not stand has another position."""
    requests = mixed_requests(120, TEXT, lengths=(5, 17, 40, 90, 300), tokens=60)
    assert await llama.worst(requests, leaving=requests[::10]) <= LIMIT["float32"]
    assert max(tokens_at_once) > 1, "no draft ever stood: nothing was shown"
    assert llama.engine._tap.readers == {}


async def test_the_same_requests_turn_red_when_rows_are_mistaken(llama):
    """What never fails proves nothing."""
    requests = mixed_requests(40, TEXT, lengths=(5, 17, 40), tokens=40)
    await llama.inside("mutate", "readings of neighbours")
    try:
        with pytest.raises(AssertionError):
            assert await llama.worst(requests) <= LIMIT["float32"]
    finally:
        await llama.inside("heal")
    assert await llama.worst(requests) <= LIMIT["float32"]


async def test_running_requests_give_up_their_blocks_and_lose_no_reading(llama):
    """Preemption: each fills one block, and there is none free when they all need the next."""
    requests = requests_that_fill_blocks(BLOCKS, symbols=5)
    before = await llama.inside("resumed")
    assert await llama.worst(requests) <= LIMIT["float32"]
    assert await llama.inside("resumed") > before, "nothing was preempted"
    health = llama.engine.health()
    assert health.preemptions_total > 0
    assert health.draft_tokens_total > health.accepted_draft_tokens_total > 0


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6, 7])
async def test_an_answer_ends_where_it_must_although_more_drafts_stand(llama, max_tokens):
    """By length in the middle of a pass: the last token is read, and none is added."""
    request = GenerationRequest(
        request_id="e",
        prompt_token_ids=tuple(TEXT[:90]),
        max_tokens=max_tokens,
        sampling=Sampling(temperature=0, ignore_eos=True),
        probe="one",
        read_last=True,
    )
    assert await llama.worst([request]) <= LIMIT["float32"]
    steps = await llama.generate(request)
    assert [step.token_id is None for step in steps] == [False] * max_tokens + [True]


async def test_log_probabilities_belong_to_their_tokens(llama, tokens_at_once):
    """Of several tokens of one output each has its own."""
    request = GenerationRequest(
        request_id="l",
        prompt_token_ids=tuple(TEXT[:60]),
        max_tokens=40,
        sampling=Sampling(temperature=0, logprobs=2, ignore_eos=True),
        probe="one",
    )
    steps = await llama.generate(request)
    assert max(tokens_at_once) > 1
    tokens = all_tokens(request, steps)
    with torch.inference_mode():
        expected = llama.reference.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    for position, step in enumerate(steps, start=59):
        value = float(expected[position, step.token_id])
        assert step.logprobs.logprob == pytest.approx(value, abs=1e-3)


async def test_what_vllm_does_not_know_with_drafts_is_told(llama):
    """The service asks the card, and answers 400 before anything starts."""
    assert set(llama.engine.card.refused_sampling) == {"min_p", "logit_bias"}


async def test_a_prompt_with_one_token_left_is_padded_and_reads_the_same(llama):
    """Two blocks of it are cached and one token is not: vLLM pads it with drafts that are none."""
    request = GenerationRequest(
        request_id="p",
        prompt_token_ids=tuple(TEXT[7:72]),
        max_tokens=20,
        sampling=Sampling(temperature=0.9, seed=7, ignore_eos=True),
        probe="one",
        read_last=True,
    )
    others = mixed_requests(6, TEXT, lengths=(17,), tokens=20)
    assert await llama.worst([request]) <= LIMIT["float32"]
    cached = llama.engine.health().cached_tokens_total
    assert await llama.worst([*others, request, *[request] * 3]) <= LIMIT["float32"]
    assert llama.engine.health().cached_tokens_total >= cached + 64


async def test_an_answer_that_fills_the_context_is_read_to_its_end(llama):
    """Drafts are cut there, and the hidden step still has its place."""
    request = GenerationRequest(
        request_id="f",
        prompt_token_ids=tuple(TEXT[:500]),
        max_tokens=11,
        sampling=Sampling(temperature=0, ignore_eos=True),
        probe="one",
        read_last=True,
    )
    assert await llama.worst([request], scoring=False) <= LIMIT["float32"]
    assert len(await llama.generate(request)) == 12
