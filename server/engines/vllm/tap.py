"""Where readings come home: taken off vLLM's outputs before vLLM distributes them.

Runs on the event loop, in vLLM's own output task. Each open request has a `Reader`; its readings
arrive before, or together with, the token that the same pass has written.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

from server.engines.base import Contribution, Reading
from server.engines.vllm.plan import MeterPlan, Order

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.async_llm import AsyncLLM


class Reader:
    """The readings of one request, in order of their positions."""

    def __init__(self, plan: MeterPlan | None, order: Order | None, *, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.has_begun = False  # its first token was written
        self.is_corrupt = False  # the model's logits were not finite
        self.readings: deque[Reading] = deque()
        self._order = order
        if plan is not None and order is not None:
            self._heads = plan.head_slice(order.probe)
            self._width = 1 + plan.heads + order.width

    def take(self, numbers: list[float]) -> None:
        """What the passes of one step have read for this request."""
        if self._order is None:
            return
        for start in range(0, len(numbers), self._width):
            self.readings.append(self._reading(numbers[start : start + self._width]))

    def _reading(self, row: list[float]) -> Reading:
        assert self._order is not None
        shares: tuple[Contribution, ...] = ()
        if self._order.contributors:
            shares = tuple(_contributions(row[self._width - self._order.width :]))
        return Reading(int(row[0]), tuple(row[1:][self._heads]), shares)


def _contributions(numbers: list[float]) -> Iterator[Contribution]:
    for i in range(0, len(numbers), 3):
        layer, neuron, share = numbers[i : i + 3]
        if layer >= 0:
            yield Contribution(int(layer), int(neuron), share)


class Tap:
    """Stands between vLLM's engine process and its distribution of outputs."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.readers: dict[str, Reader] = {}
        self.last_step = time.monotonic()
        self.seconds_total = 0.0  # wall time between outputs while there was work
        self._states = llm.output_processor.request_states
        self._get_output: Callable[[], Awaitable[EngineCoreOutputs]]
        self._get_output = llm.engine_core.get_output_async
        core: Any = llm.engine_core
        core.get_output_async = self.get_output_async

    async def get_output_async(self) -> EngineCoreOutputs:
        """vLLM's own method, with the readings taken off."""
        outputs = await self._get_output()
        now = time.monotonic()
        if outputs.outputs:
            self.seconds_total += now - self.last_step
            self.last_step = now
            self._take(outputs)
        return outputs

    def _take(self, step: EngineCoreOutputs) -> None:
        first = step.outputs[0]
        vector, first.routed_experts = first.routed_experts, None
        numbers: list[float] | None = None if vector is None else vector.tolist()
        start = len(step.outputs)  # before which stands how many numbers each request has
        for index, output in enumerate(step.outputs):
            state = self._states.get(output.request_id)
            reader = state and self.readers.get(state.external_req_id)
            stop = start if numbers is None else start + int(numbers[index])
            if reader:  # else it was aborted
                reader.has_begun = True
                reader.is_corrupt |= output.num_nans_in_logits > 0
                if numbers is not None:
                    reader.take(numbers[start:stop])
            start = stop
