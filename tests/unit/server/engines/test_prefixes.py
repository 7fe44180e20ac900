"""What prompts begin with is read once; nothing of another suppression, tenant or text gets in."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import LlamaForCausalLM

from server.engines.base import GenerationRequest, Sampling, ScoreRequest, Step
from server.engines.forward import Forward, Tap
from server.engines.prefixes import UNKNOWN, PrefixCache, shared
from server.engines.transformers import TransformersEngine

NOBODY = (0, -1, 1.0)
START = tuple(range(20, 44))  # what the prompts here begin with, 24 tokens


@pytest.fixture(scope="module")
def forward(tiny_folder) -> Forward:
    return Forward(LlamaForCausalLM.from_pretrained(tiny_folder).eval(), None)


def read(forward: Forward, prompt: tuple[int, ...]):
    """A cache whose one row holds `prompt`."""
    cache = forward.new_cache(1)
    with torch.inference_mode():
        forward([prompt], cache, [Tap()])
    return cache


def keep(prefixes: PrefixCache, forward: Forward, *prompts: tuple[int, ...], salt=NOBODY) -> None:
    for prompt in prompts:
        prefixes.keep(salt, prompt, read(forward, prompt), 0)


def test_the_longest_known_beginning_is_found(forward):
    prefixes = PrefixCache(1000)
    keep(prefixes, forward, (5, 6, 7, 8), (5, 6, 9), (5, 9, 9, 9, 9), (8, 8))
    asked = {(5, 6, 7, 9, 9): 3, (5, 6, 9, 9): 3, (5, 7): 1, (5, 9, 9, 9, 9): 5, (6, 5): 0}
    for prompt, tokens in asked.items():
        assert prefixes.find(NOBODY, prompt, most=9).tokens == tokens
    assert prefixes.find(NOBODY, (5, 6, 7, 9), most=2).tokens == 2
    assert prefixes.find(NOBODY, (5, 6, 7, 9), most=-1) is UNKNOWN
    assert [shared(a, b) for a, b in (((), (1,)), ((1, 2), (1, 2, 3)), ((1, 2), (1, 3)))] == [
        0,
        2,
        1,
    ]


def test_memory_is_bounded_and_what_was_used_last_stays(forward):
    """Without a bound a day of distinct prompts fills the machine."""
    prefixes = PrefixCache(8)
    keep(prefixes, forward, (5, 5, 5, 5), (6, 6, 6, 6))
    prefixes.find(NOBODY, (5, 5, 5, 5), most=4)
    keep(prefixes, forward, (7, 7, 7), (9,) * 9)  # the last is longer than all of the room
    assert prefixes.tokens == 7
    assert prefixes.find(NOBODY, (5, 5, 5, 5), most=4).tokens == 4
    assert prefixes.find(NOBODY, (6, 6, 6, 6), most=4) is UNKNOWN
    assert prefixes.find(NOBODY, (9, 9), most=4) is UNKNOWN
    prefixes.clear()
    assert prefixes.tokens == 0
    assert prefixes.find(NOBODY, (5, 5, 5, 5), most=4) is UNKNOWN


def test_what_is_kept_is_a_copy(forward):
    """A view would change with the batch, which goes on writing where the prompt was read."""
    prefixes = PrefixCache(100)
    cache = read(forward, (5, 6, 7))
    prefixes.keep(NOBODY, (5, 6, 7), cache, 0)
    before = cache.states(0)[0][0].clone()
    with torch.inference_mode():
        cache.states(0)[0][0].zero_()
    assert torch.equal(prefixes.find(NOBODY, (5, 6, 7), most=3).states[0][0], before)


@pytest.mark.parametrize("salt", [(1, -1, 1.0), (0, 0, 0.5), (0, 1, 0.5), (0, 0, 2.0)])
def test_another_salt_knows_nothing(forward, salt):
    prefixes = PrefixCache(100)
    keep(prefixes, forward, (5, 6, 7), salt=(0, 0, 0.0))
    assert prefixes.find((0, 0, 0.0), (5, 6, 7), most=3).tokens == 3
    assert prefixes.find(salt, (5, 6, 7), most=3) is UNKNOWN


def ask(tail: tuple[int, ...], **fields) -> GenerationRequest:
    return GenerationRequest(
        **{
            "request_id": "r",
            "prompt_token_ids": START + tail,
            "max_tokens": 8,
            "sampling": Sampling(temperature=0.0),
            "probe": "first",
            **fields,
        }
    )


def assert_same(one: list[Step], other: list[Step]) -> None:
    assert [step.token_id for step in one] == [step.token_id for step in other]
    for left, right in zip(one, other, strict=True):
        assert left.reading.position == right.reading.position
        assert left.reading.logits == pytest.approx(right.reading.logits, abs=1e-5)


async def cold(make_engine, collect, request: GenerationRequest) -> list[Step]:
    return await collect(make_engine(prefix_tokens=0), request)


async def test_a_shared_beginning_is_read_once_and_changes_nothing(make_engine, collect):
    """I3, I7: with the beginning known a prompt computes what it computes alone."""
    engine: TransformersEngine = make_engine()
    requests = [ask(tail) for tail in ((3, 4, 5), (3, 4, 6, 7), (50,) * 12, (3, 4, 5))]
    for request in requests:
        assert_same(await collect(engine, request), await cold(make_engine, collect, request))
    # 26 tokens are alike in the second, of 28; of the last all 27, less the two that are read.
    assert engine.health().cached_tokens_total == 26 + 24 + 25
    together = await asyncio.gather(*(collect(engine, request) for request in requests))
    for request, steps in zip(requests, together, strict=True):
        assert_same(steps, await cold(make_engine, collect, request))


async def test_samples_of_one_prompt_read_it_once(make_engine, collect):
    """`n` choices are `n` requests that come in the same moment: nobody has read it yet."""
    engine = make_engine()
    requests = [ask((9, 8, 7), sampling=Sampling(temperature=1.0, seed=seed)) for seed in range(6)]
    steps = await asyncio.gather(*(collect(engine, request) for request in requests))
    assert engine.health().cached_tokens_total == 5 * (len(START) + 3 - 2)
    for request, found in zip(requests, steps, strict=True):
        assert_same(found, await cold(make_engine, collect, request))


@pytest.mark.parametrize("fields", [{"alpha": 0.0}, {"alpha": 2.0}, {"tenant": 2}])
async def test_nothing_is_shared_across_suppressions_and_tenants(make_engine, collect, fields):
    """I4: keys and values that suppression has written are another text's."""
    engine = make_engine()
    await collect(engine, ask((3, 4, 5), alpha=0.5))
    await collect(engine, ask((3, 4, 5)))
    before = engine.health().cached_tokens_total
    steps = await collect(engine, ask((3, 4, 5), **fields))
    assert engine.health().cached_tokens_total == before
    assert_same(steps, await cold(make_engine, collect, ask((3, 4, 5), **fields)))


async def test_two_probes_suppress_different_neurons(make_engine, collect):
    engine = make_engine()
    await collect(engine, ask((3, 4, 5), probe="first", alpha=0.0))
    other = ask((3, 4, 5), probe="second", alpha=0.0)
    assert_same(await collect(engine, other), await cold(make_engine, collect, other))
    assert engine.health().cached_tokens_total == 0


async def test_other_probes_forget_what_was_kept(make_engine, collect, tiny_probes):
    """After a reload a number names another probe's suppression."""
    engine = make_engine()
    await collect(engine, ask((3, 4, 5), probe="first", alpha=0.0))
    engine.offer(tiny_probes[1:])
    await engine.detach()  # `second` is the number that `first` was
    request = ask((3, 4, 5), probe="second", alpha=0.0)
    assert_same(await collect(engine, request), await cold(make_engine, collect, request))
    assert engine.health().cached_tokens_total == 0


@pytest.mark.parametrize("start", [0, 10, 24, 27])
async def test_scores_get_every_reading_that_was_asked_for(make_engine, collect, start):
    """A token that is not read again has no reading: only what nobody asked about is skipped."""
    engine, bare = make_engine(), make_engine(prefix_tokens=0)
    await collect(engine, ask((3, 4, 5)))
    request = ScoreRequest(request_id="s", token_ids=(*START, 3, 4, 9), start=start, probe="first")
    found, expected = await engine.score(request), await bare.score(request)
    assert [r.position for r in found] == [r.position for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logits == pytest.approx(other.logits, abs=1e-5)
    assert engine.health().cached_tokens_total == max(0, min(start - 1, 25))
