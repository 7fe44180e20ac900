"""What comes home of vLLM's engine, and what of it vLLM is still told."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


class Home:
    """A tap whose engine gives the steps that a test makes."""

    def __init__(self, *names: str) -> None:
        from server.engines.vllm.tap import Reader, Tap

        self._steps: asyncio.Queue[Any] = asyncio.Queue()
        states = {f"{name}-inside": SimpleNamespace(external_req_id=name) for name in names}
        self.core = SimpleNamespace(get_output_async=self._steps.get)
        self.tap = Tap(
            SimpleNamespace(  # type: ignore[arg-type]
                engine_core=self.core, output_processor=SimpleNamespace(request_states=states)
            )
        )
        plan: Any = SimpleNamespace(heads=2, head_slice=lambda _: slice(0, 2))
        order: Any = SimpleNamespace(probe=0, width=0, contributors=0)
        self.readers = {name: Reader(plan, order, prompt_tokens=5) for name in names}
        self.tap.readers = dict(self.readers)

    async def step(self, *outputs: Any, numbers: Sequence[float] = ()) -> list[str]:
        """One step of the engine; the requests of which vLLM is told."""
        from vllm.v1.engine import EngineCoreOutputs

        if numbers:
            outputs[0].routed_experts = np.array(numbers, dtype=np.float32)
        self._steps.put_nowait(EngineCoreOutputs(outputs=list(outputs)))
        passed = await self.core.get_output_async()
        return [output.request_id for output in passed.outputs]


def output_of(name: str, *token_ids: int, **fields: Any) -> Any:
    from vllm.v1.engine import EngineCoreOutput

    return EngineCoreOutput(request_id=f"{name}-inside", new_token_ids=list(token_ids), **fields)


def test_each_request_gets_its_outputs_and_readings_and_vllm_the_last_ones():
    async def run() -> None:
        from vllm.v1.engine import FinishReason

        home = Home("a", "c")
        gone = output_of("b", 9)  # aborted: its numbers are passed over
        told = await home.step(
            output_of("a", 7), gone, output_of("c", 8),
            numbers=[3, 3, 6, 4, 0.5, -0.5, 4, 9, 9, 10, 1, 2, 11, 3, 4],
        )  # fmt: skip
        assert told == []
        last = output_of("a", 6, finish_reason=FinishReason.LENGTH)
        assert await home.step(last, output_of("c", 5)) == ["a-inside"]
        a, c = home.readers["a"], home.readers["c"]
        assert [(await a.output()).new_token_ids for _ in range(2)] == [[7], [6]]
        assert [(r.position, r.logits) for r in a.readings] == [(4, (0.5, -0.5))]
        assert [(r.position, r.logits) for r in c.readings] == [(10, (1, 2)), (11, (3, 4))]
        assert (a.is_over, c.is_over) == (True, False)

    asyncio.run(run())


def test_whoever_waits_is_told_and_an_error_comes_before_what_was_not_taken():
    async def run() -> None:
        from server.engines.base import RequestFailedError

        home = Home("a")
        reader = home.readers["a"]
        waiting = asyncio.ensure_future(reader.output())
        await asyncio.sleep(0)
        await home.step(output_of("a", 7))
        assert (await waiting).new_token_ids == [7]
        await home.step(output_of("a", 8), numbers=[0])
        await home.step(output_of("a", 9, num_nans_in_logits=1))
        reader.fail(RuntimeError("later"))
        with pytest.raises(RequestFailedError, match="not finite"):
            await reader.output()

    asyncio.run(run())


def test_prompt_tokens_from_the_cache_count_once_however_often_a_request_is_preempted():
    async def run() -> None:
        home = Home("a")
        stats: Any = SimpleNamespace(num_cached_tokens=48)
        await home.step(output_of("a", 7, prefill_stats=stats))
        await home.step(output_of("a", 8, prefill_stats=stats))
        assert home.tap.cached_tokens_total == 48

    asyncio.run(run())


def test_log_probabilities_are_as_many_as_the_request_wants_whatever_its_neighbours_do():
    from vllm.v1.outputs import LogprobsLists

    from server.engines.base import Sampling
    from server.engines.vllm.sampling import token_logprobs

    lists = LogprobsLists(
        np.array([[5, 9, 5, 2], [1, 1, 4, 3]]),  # the sampled one first, then the best
        np.array([[-1.5, -0.5, -1.5, -math.inf], [-0.1, -0.1, -3.0, -4.0]]),
        np.array([2, 1]),
    )
    output = output_of("a", 5, 1, new_logprobs=lists)
    found = token_logprobs(output, 0, Sampling(logprobs=2))
    assert found is not None
    assert (found.logprob, found.top) == (-1.5, ((9, -0.5), (5, -1.5)))
    found = token_logprobs(output, 1, Sampling(logprobs=0))
    assert found is not None
    assert (found.logprob, found.top) == (-0.1, ())
    assert token_logprobs(output, 0, Sampling()) is None


@pytest.mark.parametrize(
    ("number", "expected"), [(None, None), (0, "stop"), (1, "length"), (2, "abort"), (3, "error")]
)
def test_an_end_that_is_no_answer_is_an_error(number, expected):
    from vllm.v1.engine import FinishReason

    from server.engines.base import RequestFailedError
    from server.engines.vllm.sampling import finish_reason

    reason = None if number is None else FinishReason(number)
    if expected in ("abort", "error"):
        with pytest.raises(RequestFailedError, match=expected):
            finish_reason(reason)
    else:
        assert finish_reason(reason) == expected
