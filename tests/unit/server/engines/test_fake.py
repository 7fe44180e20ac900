"""The fake engine keeps the promises of the seam, else everything tested over it means little."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest

from probes.known_answer import check
from server.engines.base import (
    EngineDeadError,
    EngineOverloadedError,
    GenerationRequest,
    RequestFailedError,
    Sampling,
    ScoreRequest,
)
from server.engines.fake import FakeEngine
from server.engines.fake_model import IM_END, fake_probe


def request(text="ab 1", **fields):
    values = {"request_id": "r", "prompt_token_ids": tuple(text.encode()), "max_tokens": 50}
    return GenerationRequest(**{**values, **fields})


async def play(engine, made):
    return [step async for step in engine.generate(made)]


async def test_it_repeats_the_last_user_message():
    """Tests choose the answer by choosing the question."""
    engine = FakeEngine()
    prompt = engine.tokenizer.apply_chat_template(
        [{"role": "system", "content": "be short"}, {"role": "user", "content": "né 1"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    steps = await play(engine, request(prompt_token_ids=tuple(prompt)))
    assert bytes(step.token_id for step in steps[:-1]).decode() == "né 1"
    assert (steps[-1].token_id, steps[-1].finish_reason) == (IM_END, "stop")
    assert all(step.finish_reason is None for step in steps[:-1])


async def test_each_step_reads_the_token_before_the_one_it_writes():
    """The lag of a real engine: positions count on from the last prompt token."""
    steps = await play(FakeEngine(), request("ab 1", probe="fake"))
    assert [step.reading.position for step in steps] == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("read_last", [False, True])
async def test_a_length_finish_with_and_without_the_hidden_step(read_last):
    """One finish reason, on the last step and only there."""
    steps = await play(FakeEngine(), request(max_tokens=2, probe="fake", read_last=read_last))
    assert [step.token_id for step in steps] == [*b"ab", *([None] if read_last else [])]
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1].finish_reason == "length"


async def test_digits_read_high_and_alpha_calms_them():
    """What makes policies and suppression testable without a model."""
    for alpha, expected in ((1.0, True), (0.0, False)):
        steps = await play(FakeEngine(), request("7x", probe="fake", alpha=alpha))
        assert (steps[1].reading.logits[0] > 2) is expected
        assert steps[2].reading.logits[0] < -2


async def test_logprobs_contributors_and_seeds_are_honoured():
    """Fields of the request that the wire tests rely on."""
    made = request("a b", probe="fake", contributors=3, sampling=Sampling(logprobs=4))
    steps = await play(FakeEngine(), made)
    assert all(len(step.logprobs.top) == 4 for step in steps)
    assert all(step.logprobs.top[0] == (step.token_id, step.logprobs.logprob) for step in steps)
    assert all(len(step.reading.contributions) == 3 for step in steps)
    found = set()
    for seed in range(8):
        steps = await play(FakeEngine(), request("a b", sampling=Sampling(seed=seed)))
        found.add(bytes(step.token_id for step in steps[:-1]))
    assert found == {b"a b", b"b a"}


async def test_ignore_eos_and_loop_run_to_max_tokens():
    """For load tests."""
    for made in (request("ab", sampling=Sampling(ignore_eos=True)), request("ab[loop]")):
        steps = await play(FakeEngine(), replace(made, max_tokens=5))
        assert bytes(step.token_id for step in steps) == b"ababa"


async def test_faults_are_played_at_the_token_that_names_them():
    """Not a number, one failed request, and the death of everything."""
    engine = FakeEngine()
    steps = await play(engine, request("abc[nan:2]", probe="fake"))
    assert [math.isnan(step.reading.logits[0]) for step in steps] == [
        *[False, False],
        *[True, False],
    ]
    with pytest.raises(RequestFailedError):
        await play(engine, request("abc[fail:2]"))
    assert engine.health().alive
    with pytest.raises(EngineDeadError):
        await play(engine, request("abc[die:2]"))
    assert not engine.health().alive
    with pytest.raises(EngineDeadError):
        await play(engine, request("abc"))
    assert engine.health().running == 0


async def test_a_hanging_request_ends_when_the_engine_is_closed():
    """`aclose` ends every request with EngineDeadError."""
    engine = FakeEngine()
    task = asyncio.create_task(play(engine, request("abc[hang:1]")))
    await asyncio.sleep(0.05)
    assert engine.health().running == 1
    assert engine.health().seconds_since_step > 0
    await engine.aclose()
    with pytest.raises(EngineDeadError):
        await task


async def test_a_full_queue_refuses_before_the_first_step():
    """And a place that becomes free is given to the one that waits."""
    engine = FakeEngine(max_num_seqs=1, max_waiting_requests=1)
    first = engine.generate(request("abc[loop]", max_tokens=1000))
    await anext(first)
    second = asyncio.create_task(play(engine, request("de")))
    await asyncio.sleep(0)
    assert engine.health().waiting == 1
    with pytest.raises(EngineOverloadedError):
        await play(engine, request("fg"))
    await first.aclose()
    assert len(await second) == 3
    health = engine.health()
    assert (health.running, health.waiting, health.waiting_tokens) == (0, 0, 0)


async def test_scoring_equals_generating():
    """The same token at the same place has the same reading."""
    engine = FakeEngine()
    steps = await play(engine, request("ab 1", probe="fake"))
    ids = (*b"ab 1", *(step.token_id for step in steps))
    readings = await engine.score(
        ScoreRequest(request_id="s", token_ids=ids, start=4, probe="fake")
    )
    assert readings[:-1] == tuple(step.reading for step in steps)


async def test_the_probe_passes_its_own_known_answers():
    """The server's start-up check runs over the fake engine, too."""
    engine, probe = FakeEngine(), fake_probe()
    found = []
    for known in probe.card.known_answers:
        made = ScoreRequest(request_id="k", token_ids=known.token_ids, start=0, probe="fake")
        found.append([reading.logits for reading in await engine.score(made)])
    check(probe, found)
