"""Readings on their way to their requests: cut by length, dropped with those that left."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from server.engines.base import Contribution, Reading
from server.engines.vllm.plan import MeterPlan, Order
from server.engines.vllm.tap import Reader, Tap


@pytest.fixture
def plan(tiny_probes) -> MeterPlan:
    return MeterPlan(probes=tiny_probes, intermediate_size=48, hidden_size=32, suppression=True)


def output(request_id: str, *, nans: int = 0) -> SimpleNamespace:
    return SimpleNamespace(request_id=request_id, routed_experts=None, num_nans_in_logits=nans)


class Core:
    """vLLM's client of its engine process; puts out what the test says."""

    def __init__(self) -> None:
        self.steps: list[SimpleNamespace] = []

    async def get_output_async(self) -> SimpleNamespace:
        return self.steps.pop(0)


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
    tap.readers["a"] = a = Reader(plan, Order(0, 1.0, 0, False), prompt_tokens=3)
    tap.readers["b"] = b = Reader(plan, Order(1, 1.0, 2, False), prompt_tokens=3)
    tap.readers["c"] = c = Reader(plan, None, prompt_tokens=3)
    step = SimpleNamespace(outputs=[output(f"{name}-1f") for name in ("c", "gone", "b", "a")])
    of_b = [7, 0.1, 0.2, 0.3, 0.4, 1, 5, 0.25, -1, 0, 0]  # one contribution, and no second
    of_a = [2, 1.5, 2.5, 3.5, 4.5, 3, 5.5, 6.5, 7.5, 8.5]  # two tokens
    vector = [0, 5, len(of_b), len(of_a), 9, 9, 9, 9, 9, *of_b, *of_a]
    step.outputs[0].routed_experts = np.array(vector, dtype=np.float32)
    core.steps.append(step)
    assert await core.get_output_async() is step
    assert step.outputs[0].routed_experts is None, "vLLM must not see what is not its own"
    assert list(a.readings) == [Reading(2, (1.5, 2.5)), Reading(3, (5.5, 6.5))]
    (reading,) = b.readings
    assert reading.position == 7
    assert reading.logits == pytest.approx((0.3, 0.4))
    assert reading.contributions == (Contribution(1, 5, 0.25),)
    assert not c.readings
    assert a.has_begun
    assert c.has_begun


async def test_a_step_without_readings_gives_none_and_never_old_ones(tap, core, plan):
    """The monitor shows a missing reading as not scored."""
    tap.readers["a"] = reader = Reader(plan, Order(0, 1.0, 0, False), prompt_tokens=3)
    core.steps.append(SimpleNamespace(outputs=[output("a-1f", nans=2)]))
    await core.get_output_async()
    assert not reader.readings
    assert reader.is_corrupt
