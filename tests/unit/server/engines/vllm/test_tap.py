"""Tokens and readings on their way to their requests; those of requests that left are dropped."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from probes.errors import HNeuronsError
from server.engines.base import Contribution, Reading
from server.engines.vllm.plan import MeterPlan, Order
from server.engines.vllm.tap import Reader, Tap

ORDER = Order(0, 1.0, 0, False)


@pytest.fixture
def plan(tiny_probes) -> MeterPlan:
    return MeterPlan(probes=tiny_probes, intermediate_size=48, hidden_size=32, suppression=True)


def output(name: str, *token_ids: int, **fields: Any) -> SimpleNamespace:
    """As vLLM's EngineCoreOutput, of the request that we call `name`."""
    common: dict[str, Any] = {
        "routed_experts": None,
        "num_nans_in_logits": 0,
        "prefill_stats": None,
        "finished": False,
    }
    request_id, tokens = f"{name}-1f", list(token_ids)
    return SimpleNamespace(request_id=request_id, new_token_ids=tokens, **common | fields)


class Core:
    """vLLM's client of its engine process; puts out what the test says."""

    def __init__(self) -> None:
        self._steps: list[SimpleNamespace] = []

    async def get_output_async(self) -> SimpleNamespace:
        return self._steps.pop(0)

    async def step(self, *outputs: SimpleNamespace) -> list[str]:
        """The requests of one step of which vLLM is told."""
        self._steps.append(SimpleNamespace(outputs=list(outputs), scheduler_stats=None))
        passed = await self.get_output_async()
        return [output.request_id for output in passed.outputs]


@pytest.fixture
def core() -> Core:
    return Core()


@pytest.fixture
def tap(core) -> Tap:
    states = {f"{name}-1f": SimpleNamespace(external_req_id=name) for name in "abc"}
    llm = SimpleNamespace(engine_core=core, output_processor=SimpleNamespace(request_states=states))
    return Tap(llm)


async def test_each_request_gets_its_own_numbers(tap, core, plan):
    """One vector for all: a wrong cut gives one request the risk of another."""
    tap.readers["a"] = a = Reader(plan, ORDER, prompt_tokens=3)
    tap.readers["b"] = b = Reader(plan, Order(1, 1.0, 2, False), prompt_tokens=3)
    tap.readers["c"] = c = Reader(plan, None, prompt_tokens=3)
    of_b = [7, 0.1, 0.2, 0.3, 0.4, 1, 5, 0.25, -1, 0, 0]  # one contribution, and no second
    of_a = [2, 1.5, 2.5, 3.5, 4.5, 3, 5.5, 6.5, 7.5, 8.5]  # two tokens
    vector = [0, 5, len(of_b), len(of_a), 9, 9, 9, 9, 9, *of_b, *of_a]
    first = output("c", 4, routed_experts=np.array(vector, dtype=np.float32))
    await core.step(first, output("gone", 5), output("b", 6), output("a", 7, 8))
    assert first.routed_experts is None, "vLLM must not see what is not its own"
    assert list(a.readings) == [Reading(2, (1.5, 2.5)), Reading(3, (5.5, 6.5))]
    (reading,) = b.readings
    assert reading.position == 7
    assert reading.logits == pytest.approx((0.3, 0.4))
    assert reading.contributions == (Contribution(1, 5, 0.25),)
    assert not c.readings
    assert all(reader.has_begun for reader in (a, b, c))
    assert [(await reader.output()).new_token_ids for reader in (a, b, c)] == [[7, 8], [6], [4]]


async def test_a_whole_prompt_is_unpacked_when_it_is_asked_for(tap, core, plan):
    """A hundred thousand readings, made on the event loop, would stop every stream for seconds."""
    tap.readers["a"] = reader = Reader(plan, ORDER._replace(whole_prompt=True), prompt_tokens=3)
    vector = [10, 2, 1.5, 2.5, 3.5, 4.5, 3, 5.5, 6.5, 7.5, 8.5]
    await core.step(output("a", 7, routed_experts=np.array(vector, dtype=np.float32)))
    assert not reader.readings
    assert reader.of_whole_prompt() == [Reading(2, (1.5, 2.5)), Reading(3, (5.5, 6.5))]


async def test_vllm_is_told_of_the_last_output_of_a_request_alone(tap, core):
    """It forgets a request by that; a request that it never forgot would be kept for good."""
    tap.readers["a"] = reader = Reader(None, None, prompt_tokens=3)
    assert await core.step(output("a", 7), output("b", 8)) == []
    assert not reader.is_over
    told = await core.step(
        output("a", 9, finished=True), output("b", 8), output("gone", finished=True)
    )
    assert told == ["a-1f", "gone-1f"]
    assert reader.is_over
    assert [(await reader.output()).new_token_ids for _ in range(2)] == [[7], [9]]


async def test_a_step_without_readings_is_a_meter_that_failed(tap, core, plan, caplog):
    """Taken for a token that nobody reads, it would pass for the harmless end of an answer."""
    tap.readers["a"] = reader = Reader(plan, ORDER, prompt_tokens=3)
    tap.readers["b"] = prompt = Reader(plan, ORDER._replace(whole_prompt=True), prompt_tokens=3)
    await core.step(output("a", 7), output("b", 7))
    await core.step(output("a", 8, 9))
    await core.step(output("a", finished=True))  # ended without a token: nothing is missing
    assert [reading.position for reading in reader.readings] == [2, 3, 4]
    assert np.isnan([reading.logits for reading in reader.readings]).all()
    assert prompt.of_whole_prompt() == []  # `score` knows which positions it lacks
    assert (await reader.output()).new_token_ids == [7]
    await core.step(output("a", 8, 9, routed_experts=np.array([3, 5, 1.5, 2.5], np.float32)))
    assert np.isnan([reading.logits for reading in reader.readings]).all()  # one for two is none
    (record,) = caplog.records  # and not one for every token
    assert "wrote 1 tokens and came home with 0 numbers" in record.message


async def test_a_step_that_puts_nothing_out_is_a_sign_of_life(tap, core):
    """A prompt that takes a minute to read must not count as a hang."""
    tap.readers["a"] = Reader(None, None, prompt_tokens=64)
    tap.last_step -= 100
    assert await core.step() == []
    assert time.monotonic() - tap.last_step < 10
    assert 100 <= tap.seconds_total < 110


async def test_what_the_scheduler_tells_is_kept_until_it_tells_again(tap, core):
    totals = {"preempted": 3, "drafted": 8, "accepted": 5}
    told = SimpleNamespace(kv_cache_usage=0.5, kv_connector_stats=totals)
    core._steps.append(SimpleNamespace(outputs=[], scheduler_stats=told))
    await core.get_output_async()
    await core.step()
    assert (tap.cache_usage, tap.totals) == (0.5, totals)


async def test_whoever_waits_is_told(tap, core):
    tap.readers["a"] = reader = Reader(None, None, prompt_tokens=3)
    waiting = asyncio.ensure_future(reader.output())
    await asyncio.sleep(0)
    assert not waiting.done()
    await core.step(output("a", 7))
    assert (await waiting).new_token_ids == [7]


async def test_logits_that_are_no_numbers_fail_the_request_before_its_tokens_go_out(tap, core):
    """What was sampled from them is noise, and so may be what came just before."""
    tap.readers["a"] = reader = Reader(None, None, prompt_tokens=3)
    await core.step(output("a", 7))
    await core.step(output("a", 8, num_nans_in_logits=2))
    reader.fail(RuntimeError("later"))
    with pytest.raises(HNeuronsError, match="not finite"):
        await reader.output()


async def test_prompt_tokens_from_the_cache_are_counted(tap, core):
    tap.readers["a"] = Reader(None, None, prompt_tokens=64)
    await core.step(output("a", 7, prefill_stats=SimpleNamespace(num_cached_tokens=48)))
    await core.step(output("a", 8))
    assert tap.cached_tokens_total == 48
