"""What vLLM 0.32 does wrong, or slowly, where this server needs it, put right in its workers.

Each was seen, and has a test that fails without it. Gone with the version that mends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler
from vllm.v1.worker import gpu_model_runner

from server.engines.vllm.meter import upload


def repair(runner: Any) -> None:
    """Once, when the model of vLLM's model runner is loaded."""
    gpu_model_runner.count_nans_per_row = nans_by_request(runner)
    if current_platform.is_cpu():
        rejection_sampler.expand_batch_to_tokens = expand_to_rows
        sample = rejection_sampler._rejection_random_sample
        rejection_sampler._rejection_random_sample = rejecting_padding(sample)


def rows_with_nans(logits: Tensor) -> Tensor:
    """`[rows, vocab]` -> `[rows]` int32: 1 where a row is not all numbers.

    In the place of vLLM's count, whose table of flags took 1.3 ms of each step with 32 rows of
    49,152 on a CPU, a hundredth of it; a sum takes .04. Minus infinity is a mask, not a fault.
    """
    return logits.sum(dim=-1, dtype=torch.float32).isnan().to(torch.int32)


def nans_by_request(runner: Any) -> Callable[[Tensor], Tensor]:
    """`rows_with_nans`, summed by request: `[requests]` int32.

    With drafts a request has several rows of logits. vLLM takes the count of row i for that of
    request i, and would end another request than the one that is broken.
    """
    sample: Callable[..., Any] = runner._sample
    sizes: list[int] = []  # rows of each request in this pass; empty: one each

    def noting_sizes(logits: Any, metadata: Any) -> Any:
        sizes[:] = [] if metadata is None else [1 + drafts for drafts in metadata.num_draft_tokens]
        return sample(logits, metadata)

    def counts(logits: Tensor) -> Tensor:
        rows = rows_with_nans(logits)
        if not sizes:
            return rows
        owner = upload([i for i, size in enumerate(sizes) for _ in range(size)], rows)
        return rows.new_zeros(len(sizes)).index_add_(0, owner, rows)

    runner._sample = noting_sizes
    return counts


def rejecting_padding(sample: Callable[..., None]) -> Callable[..., None]:
    """vLLM's sampler for drafts, which never accepts a draft that is none.

    The scheduler pads with -1 where a graph wants as many drafts of every request. vLLM's kernel
    for CPUs looks up the probability of token -1, which is another row's, and may accept it: then
    the next token is one that was drawn after a token that nobody wrote.
    """

    @wraps(sample)
    def rejecting(
        output: Tensor,
        last: Tensor,
        drafts: Tensor,
        draft_probs: Tensor | None,
        target_probs: Tensor,
        bonus: Tensor,
        recovered: Tensor,
        uniform: Tensor,
        *rest: Any,
    ) -> None:
        is_padding = drafts < 0
        sample(
            output,
            last,
            drafts.clamp(min=0),
            draft_probs,
            target_probs,
            bonus,
            recovered,
            uniform.masked_fill(is_padding, torch.inf),  # no probability reaches it
            *rest,
        )

    return rejecting


def expand_to_rows(
    values: Tensor, last: Tensor, rows: int, replace_from: float = 0, replace_to: float = 0
) -> Tensor:
    """`[requests]` -> `[rows]`: each request's value for each of its drafts.

    vLLM's own for CPUs writes into a copy made for its kernel and returns what was in the memory:
    with drafts, a greedy request beside a sampled one was divided by such a temperature.
    """
    counts = last.diff(prepend=last.new_zeros(1))
    replaced = torch.where(values == replace_from, replace_to, values).to(values.dtype)
    return replaced.repeat_interleave(counts, output_size=rows)


@contextmanager
def keeping_idle_generators(runner: Any) -> Iterator[None]:
    """A seeded request whose prompt is not read to its end draws no random number yet.

    vLLM draws one for every row and turns the generator back afterwards, which generators on the
    CPU cannot do: one seeded request with a long prompt would end the engine (seen with 0.32).
    """
    generators = runner.input_batch.generators
    idle = np.nonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])[0].tolist()
    held = {row: generators.pop(row) for row in idle if row in generators}
    yield
    generators.update(held)
