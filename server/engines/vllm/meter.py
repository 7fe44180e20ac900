"""One worker's meter: fills in what the next pass needs, takes out what it has read.

Rows of a pass are mapped to requests by the runner's own order. A step's readings leave as one flat
array, `Readings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)

from server.engines.vllm.layers import install
from server.engines.vllm.plan import EXTRA_ARGS_KEY, Layout, MeterPlan, Order

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class Readings(NamedTuple):
    """What the passes of one step have read, request by request in the runner's order.

    data    float32, of each reading: position, logits of all heads, then (layer, neuron, share) of
            each contribution; integers below 2**24 are exact
    bounds  `[requests + 1]`: where each request's numbers begin and end
    """

    data: NDArray[np.float32]
    bounds: list[int]


class Pending:
    """Readings on their way from the device; `take` waits for them."""

    def __init__(
        self, meter: WorkerMeter, step: _Step, rows: Tensor, shares: Tensor | None
    ) -> None:
        self._meter, self._step = meter, step
        self._rows = rows.to("cpu", non_blocking=True)
        self._shares = None if shares is None else shares.to("cpu", non_blocking=True)
        self._copied: Any = torch.cuda.Event() if rows.is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def take(self) -> Readings:
        if self._copied is not None:
            self._copied.synchronize()
        numbers = self._rows.numpy()
        counts = [last - first for first, last in self._step.spans]
        if self._shares is None:
            bounds = np.cumsum([0, *counts]) * numbers.shape[1]
            return Readings(numbers.reshape(-1), bounds.tolist())
        return self._with_contributions(numbers, self._shares, counts)

    def _with_contributions(
        self, numbers: NDArray[np.float32], shares: Tensor, counts: Sequence[int]
    ) -> Readings:
        parts: list[NDArray[np.float32]] = []
        start = 0
        for order, count in zip(self._step.orders, counts, strict=True):
            mine = slice(start, start + count)
            part = numbers[mine]
            if order is not None and order.contributors:
                best = self._meter.largest(order, shares[mine])
                part = np.concatenate([part, best.numpy()], axis=1)
            parts.append(part.reshape(-1))
            start += count
        bounds = np.cumsum([0, *map(len, parts)])
        return Readings(np.concatenate(parts), bounds.tolist())


class _Step(NamedTuple):
    """One pass: its requests in the runner's order, and the rows of each that are taken."""

    request_ids: list[str]
    counts: list[int]  # rows of each request
    drafts: list[int]  # how many of them, the last ones, were fed drafts of its next tokens
    orders: list[Order | None]
    spans: list[tuple[int, int]]  # half-open
    rows: Tensor  # all of them, in one


def upload(numbers: Sequence[int], beside: Tensor) -> Tensor:
    """`numbers` as int64 on the device of `beside`. From memory that may be swapped out the copy
    would wait for all that the device still has to do, and async scheduling for nothing."""
    here = torch.tensor(numbers, dtype=torch.int64, pin_memory=beside.is_cuda)
    return here.to(beside.device, non_blocking=True)


class WorkerMeter:
    """The meter of one rank. Calls come in order: `learn`, `begin`, `read`.

    A stage of a pipeline has some of the layers. What it reads goes on to the next one with the
    pass itself (`values`, `receive`); the last stage has all, and gives the readings.
    """

    def __init__(
        self, model: nn.Module, plan: MeterPlan, *, layers: range, max_tokens: int
    ) -> None:
        """`layers` of the whole model are those that this rank's `model` has."""
        self._ranks = get_tensor_model_parallel_world_size()
        layout = Layout.of(plan, rank=get_tensor_model_parallel_rank(), ranks=self._ranks)
        self._plan = plan
        self._buffers = install(model, plan, layout, layers=layers, max_tokens=max_tokens)
        device = self._buffers.cett.device
        self._flat = layout.flat.to(device)
        self._is_here = ((plan.layer >= layers.start) & (plan.layer < layers.stop)).to(device)
        self._earlier: Tensor | None = None  # what the stages before have read of this pass
        self._weight, self._bias = plan.weight.to(device), plan.bias.to(device)
        self._orders: dict[str, Order] = {}
        self._layout = self._lay_out([], [], [])  # of the pass that runs, or ran last
        self._is_running = False
        self._is_dosed = False

    def learn(self, scheduled: SchedulerOutput) -> None:
        """Remember the orders of new requests, forget those of finished ones."""
        for request_id in scheduled.finished_req_ids:
            self._orders.pop(request_id, None)
        for request in scheduled.scheduled_new_reqs:
            extra = request.sampling_params and request.sampling_params.extra_args
            if extra and EXTRA_ARGS_KEY in extra:
                self._orders[request.req_id] = Order(*extra[EXTRA_ARGS_KEY])

    def begin(
        self,
        request_ids: Sequence[str],
        num_tokens: Mapping[str, int],
        drafts: Mapping[str, Sequence[int]],
    ) -> None:
        """Before a pass over so many tokens of each request, in this order of rows.

        `drafts` of a request's next tokens are the last of its tokens in this pass. The row before
        them and theirs are all read: which drafts stand is known when the pass is over.
        """
        ids, counts = list(request_ids), [num_tokens[request_id] for request_id in request_ids]
        drafted = [len(drafts.get(request_id, ())) for request_id in request_ids]
        if self._layout[:3] != (ids, counts, drafted):
            self._layout = self._lay_out(ids, counts, drafted)
        self._is_running = True
        self._fill_in_doses(self._layout.orders, counts)

    def _lay_out(self, request_ids: list[str], counts: list[int], drafts: list[int]) -> _Step:
        orders = [self._orders.get(request_id) for request_id in request_ids]
        spans = []
        end = 0
        for order, count, drafted in zip(orders, counts, drafts, strict=True):
            end += count
            taken = 0 if order is None else count if order.whole_prompt else 1 + drafted
            spans.append((end - taken, end))
        rows = [row for first, last in spans for row in range(first, last)]
        return _Step(request_ids, counts, drafts, orders, spans, upload(rows, self._buffers.cett))

    def _fill_in_doses(self, orders: Sequence[Order | None], counts: Sequence[int]) -> None:
        dosed = any(order is not None and order.alpha != 1 for order in orders)
        if not dosed and not self._is_dosed:
            return
        self._is_dosed = dosed
        if not dosed:
            self._buffers.dose.zero_()  # all rows: a later pass may have more of them than this one
            return
        by_request = torch.zeros(len(orders), len(self._plan.probes))
        for index, order in enumerate(orders):
            if order is not None:
                by_request[index, order.probe] = order.alpha - 1
        dose = self._buffers.dose
        rows = by_request.repeat_interleave(torch.tensor(counts), dim=0)
        if dose.is_cuda:
            rows = rows.pin_memory()
        dose[: len(rows)].copy_(rows, non_blocking=True)

    def receive(self, earlier: Tensor | None) -> None:
        """Before the pass: `values` of the stage before."""
        self._earlier = earlier

    def values(self) -> Tensor | None:
        """After the pass: `[rows, neurons]` CETT in the plan's order, NaN in layers to come.

        None when nothing of the pass is to be read.
        """
        was_running, self._is_running = self._is_running, False
        earlier, self._earlier = self._earlier, None
        if not was_running or len(self._layout.rows) == 0:
            return None
        here = self._cett_of(self._layout.rows)
        return here if earlier is None else torch.where(self._is_here, here, earlier)

    def read(self, positions: Tensor) -> Pending | None:
        """`values` as logits and contributions; `positions` of all rows of the pass."""
        values = self.values()
        if values is None:
            return None
        step, rows = self._layout, self._layout.rows
        logits = values @ self._weight + self._bias
        numbers = torch.cat([positions[rows].float().unsqueeze(-1), logits], dim=-1)
        wanted = any(order is not None and order.contributors for order in step.orders)
        return Pending(self, step, numbers, values if wanted else None)

    def _cett_of(self, rows: Tensor) -> Tensor:
        """`[rows, neurons]` of this stage, complete on every rank of its tensor parallelism.

        What was read becomes NaN: a layer that did not run in the next pass is seen as such.
        """
        cett = self._buffers.cett
        values = cett[:, rows]
        cett.index_fill_(1, rows, torch.nan)
        values = values.transpose(0, 1)  # [rows, layers, K]
        if self._ranks > 1:
            values = tensor_model_parallel_all_gather(values.unsqueeze(1).contiguous(), dim=1)
        chosen: Tensor = values.flatten(1)[:, self._flat]
        return chosen

    def largest(self, order: Order, values: Tensor) -> Tensor:
        """`[rows, 3 * contributors]`: the largest shares in the order's token head.

        `values` `[rows, neurons]` is the CETT of these rows, on the CPU.
        """
        weight = self._plan.weight[:, self._plan.token_head(order.probe)]
        shares = values * weight
        k = min(order.contributors, int((weight != 0).sum()))
        best = shares.abs().topk(k, dim=-1).indices
        table = torch.zeros(len(values), order.contributors, 3)
        table[:, :k, 0] = self._plan.layer[best].float()
        table[:, :k, 1] = self._plan.neuron[best].float()
        table[:, :k, 2] = shares.gather(-1, best)
        table[:, k:, 0] = -1  # there are no more
        return table.flatten(1)
