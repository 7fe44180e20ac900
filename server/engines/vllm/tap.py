"""Where tokens and readings come home: taken off vLLM's outputs before vLLM distributes them.

Runs on the event loop, in vLLM's own output task. Each open request has a `Reader`; its readings
arrive before, or together with, the token that the same pass has written. vLLM itself is handed
only the last output of a request: what it makes of every token (a `RequestOutput`, an event, a
task to wake) is for callers that want its text, and took a seventh of the server's time per token.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from server.engines.base import Contribution, Reading, RequestFailedError
from server.engines.vllm.plan import MeterPlan, Order

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.engine.async_llm import AsyncLLM


log = logging.getLogger(__name__)


class Reader:
    """What comes home of one request: its outputs, and its readings in order of their positions."""

    def __init__(self, plan: MeterPlan | None, order: Order | None, *, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.has_begun = False  # its first token was written
        self.is_over = False  # its last output has come
        self.readings: deque[Reading] = deque()
        self.unpacked: list[NDArray[np.float32]] = []  # of a whole prompt, see `of_whole_prompt`
        self._outputs: deque[EngineCoreOutput] = deque()
        self._error: Exception | None = None
        self._news: asyncio.Future[None] | None = None  # awaited
        self._order = order
        self._written = 0
        self._is_told = False  # the log knows that readings are missing
        if plan is not None and order is not None:
            self._heads = plan.head_slice(order.probe)
            self._width = 1 + plan.heads + order.width

    async def output(self) -> EngineCoreOutput:
        """The next output; raises what has failed the request, whatever came before it."""
        while self._error is None and not self._outputs:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        if self._error is not None:
            raise self._error
        return self._outputs.popleft()

    def take(self, output: EngineCoreOutput, numbers: NDArray[np.float32]) -> None:
        """What one step has written and read for this request."""
        if self._order is not None and self._order.whole_prompt:
            self.unpacked.append(numbers)
        elif self._order is not None:
            if len(numbers) == len(output.new_token_ids) * self._width:
                self.readings.extend(self._unpack(numbers))
            else:
                self.readings.extend(self._missing(len(output.new_token_ids), len(numbers)))
        self._written += len(output.new_token_ids)
        self._outputs.append(output)
        self.has_begun = True
        self.is_over = output.finished
        self._tell()

    def fail(self, error: Exception) -> None:
        """No more outputs; the first error counts."""
        self._error = self._error or error
        self._tell()

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def of_whole_prompt(self) -> list[Reading]:
        """All readings of a prompt; takes seconds for a long one, so not on the event loop."""
        return [reading for numbers in self.unpacked for reading in self._unpack(numbers)]

    def _unpack(self, numbers: NDArray[np.float32]) -> Iterator[Reading]:
        flat = numbers.tolist()
        for start in range(0, len(flat), self._width):
            yield self._reading(flat[start : start + self._width])

    def _missing(self, count: int, found: int) -> Iterator[Reading]:
        """A step that wrote and was not read as often: the meter has failed, and that is not what
        happens to an end token, which nobody reads."""
        if not self._is_told:
            self._is_told = True
            log.error(
                "a step wrote %d tokens and came home with %d numbers of readings; tokens of this "
                "request are not scored",
                *(count, found),
            )
        start = self.prompt_tokens - 1 + self._written
        heads = self._heads.stop - self._heads.start
        for position in range(start, start + count):
            yield Reading(position, (math.nan,) * heads)

    def _reading(self, row: Sequence[float]) -> Reading:
        assert self._order is not None
        shares: tuple[Contribution, ...] = ()
        if self._order.contributors:
            shares = tuple(_contributions(row[self._width - self._order.width :]))
        return Reading(int(row[0]), tuple(row[1:][self._heads]), shares)


def _contributions(numbers: Sequence[float]) -> Iterator[Contribution]:
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
        self.cached_tokens_total = 0  # prompt tokens whose keys and values were there already
        self.cache_usage = 0.0  # share of the blocks of keys and values, some steps ago
        self.totals = dict.fromkeys(("preempted", "drafted", "accepted"), 0)
        self._states = llm.output_processor.request_states
        self._get_output: Callable[[], Awaitable[EngineCoreOutputs]]
        self._get_output = llm.engine_core.get_output_async
        core: Any = llm.engine_core
        core.get_output_async = self.get_output_async

    async def get_output_async(self) -> EngineCoreOutputs:
        """vLLM's own method; of what it gives, the last output of each request goes on."""
        outputs = await self._get_output()
        now = time.monotonic()
        self.seconds_total += now - self.last_step if self.readers else 0.0
        self.last_step = now
        if (statistics := outputs.scheduler_stats) is not None:
            self.cache_usage = statistics.kv_cache_usage
            self.totals = statistics.kv_connector_stats or self.totals
        if outputs.outputs:
            self._take(outputs)
            outputs.outputs = [output for output in outputs.outputs if output.finished]
        return outputs

    def _take(self, step: EngineCoreOutputs) -> None:
        first = step.outputs[0]
        vector, first.routed_experts = first.routed_experts, None
        start = len(step.outputs)  # before which stands how many numbers each request has
        counts = [0] * start if vector is None else vector[:start].astype(np.int64).tolist()
        numbers = np.empty(0, np.float32) if vector is None else vector
        for output, count in zip(step.outputs, counts, strict=True):
            state = self._states.get(output.request_id)
            reader = state and self.readers.get(state.external_req_id)
            stop = start + count
            if reader:  # else it was aborted
                if output.prefill_stats is not None:  # with its first output alone
                    self.cached_tokens_total += output.prefill_stats.num_cached_tokens
                if output.num_nans_in_logits > 0:
                    reader.fail(_corrupt())
                reader.take(output, numbers[start:stop])
            start = stop


def _corrupt() -> RequestFailedError:
    return RequestFailedError(
        "nonfinite_logits", "the model's logits are not finite; the request cannot go on"
    )
