"""What tests do inside a worker's process: count, and break one mechanism to see a test turn red.

Engines of these tests are forked, so that a worker has the methods that `open_up` has added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

Mutant = Callable[[Any], Any]  # a method of the meter into what takes its place


@contextmanager
def open_up() -> Iterator[None]:
    """While the block runs, workers that are forked can be asked for what stands below.

    Their engines speak after every silent step: a tiny model reads a long prompt in no time.
    """
    from server.engines.vllm import worker as of_worker
    from server.engines.vllm.meter import WorkerMeter
    from server.engines.vllm.worker import MeteredWorker

    resumed = 0
    originals: dict[str, Any] = {}
    learn = WorkerMeter.learn

    def counting(meter: Any, scheduled: Any) -> None:
        nonlocal resumed
        resumed += len(scheduled.scheduled_cached_reqs.resumed_req_ids)
        learn(meter, scheduled)

    def mutate(worker: Any, name: str) -> None:
        method, mutant = MUTANTS[name]
        originals[method] = getattr(WorkerMeter, method)
        setattr(WorkerMeter, method, mutant(originals[method]))

    def heal(worker: Any) -> None:
        for method, original in originals.items():
            setattr(WorkerMeter, method, original)
        originals.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_worker, "SECONDS_OF_SILENCE", 0.0)
        patch.setattr(WorkerMeter, "learn", counting)
        patch.setattr(MeteredWorker, "resumed", lambda worker: resumed, raising=False)
        patch.setattr(MeteredWorker, "mutate", mutate, raising=False)
        patch.setattr(MeteredWorker, "heal", heal, raising=False)
        patch.setattr(MeteredWorker, "schemes", _schemes, raising=False)
        yield


def _schemes(worker: Any) -> list[str]:
    """How the layers that are read keep their weights."""
    read = (m for m in worker.model_runner.model.modules() if hasattr(m, "hn_columns"))
    return sorted({type(getattr(module, "scheme", None)).__name__ for module in read})


def _reversed_rows(begin: Any) -> Any:
    return lambda meter, ids, *rows: begin(meter, list(ids)[::-1], *rows)


def _rows_of_the_last_pass(cett_of: Any) -> Any:
    before: list[torch.Tensor] = []

    def stale(meter: Any, rows: torch.Tensor) -> torch.Tensor:
        before.append(cett_of(meter, rows))
        old = before[-2] if len(before) > 1 else before[-1]
        return old[torch.arange(len(rows)) % len(old)]

    return stale


def _rows_of_neighbours(cett_of: Any) -> Any:
    return lambda meter, rows: cett_of(meter, rows).roll(1, 0)


def _doses_of_the_last_pass(fill_in: Any) -> Any:
    before: list[Any] = []

    def stale(meter: Any, orders: Any, counts: Any) -> None:
        before.append((orders, counts))
        fill_in(meter, *before[-2 if len(before) > 1 else -1])

    return stale


def _other_half_of_the_columns(cett_of: Any) -> Any:
    """With two ranks: each neuron is looked for where the other rank has one of its layer."""

    def swapped(meter: Any, rows: torch.Tensor) -> torch.Tensor:
        flat = meter._flat
        cells = meter._buffers.cett.shape[0] * meter._buffers.cett.shape[2] * meter._ranks
        meter._flat = (flat + cells // 2) % cells
        try:
            return cett_of(meter, rows)
        finally:
            meter._flat = flat

    return swapped


def _earlier_of_another_pass(receive: Any) -> Any:
    before: list[torch.Tensor | None] = [None]

    def stale(meter: Any, earlier: torch.Tensor | None) -> None:
        before.append(earlier)
        old = before[-2] if before[-2] is not None else earlier
        if old is not None and earlier is not None:
            old = old[torch.arange(len(earlier)) % len(old)]
        receive(meter, old)

    return stale


MUTANTS: dict[str, tuple[str, Mutant]] = {
    "row order swapped": ("begin", _reversed_rows),
    "readings of neighbours": ("_cett_of", _rows_of_neighbours),
    "columns of another rank": ("_cett_of", _other_half_of_the_columns),
    "stale readings": ("_cett_of", _rows_of_the_last_pass),
    "another pass of the stage before": ("receive", _earlier_of_another_pass),
    "nothing from the stage before": ("receive", lambda receive: lambda meter, _: None),
    "stale doses": ("_fill_in_doses", _doses_of_the_last_pass),
}
