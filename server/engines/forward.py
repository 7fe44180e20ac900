"""One forward pass of a batch, with the meter around it; knows no request and no scheduling."""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.tap import Meter
from server.engines.attention import stored
from server.engines.base import Contribution
from server.engines.cache import BatchCache

logger = logging.getLogger(__name__)


class Tap(NamedTuple):
    """What one row of a pass wants from the meter."""

    probe: int | None = None  # index of its probe; None: not read
    alpha: float = 1.0

    @property
    def suppression(self) -> tuple[int, float]:
        """What a row's keys and values depend on besides its tokens: whose neurons, by how much."""
        return (-1, 1.0) if self.probe is None or self.alpha == 1 else (self.probe, self.alpha)


class Forward:
    """The model as the scheduler sees it: token ids in, next-token logits and readings out."""

    def __init__(
        self, model: PreTrainedModel, meter: Meter | None, *, longest: int | None = None
    ) -> None:
        """longest: tokens that a row may come to hold; None: any number"""
        self._model = model
        self._longest = longest
        self.meter = meter  # may be changed between two passes
        self.device = model.device
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.num_layers: int = model.config.get_text_config().num_hidden_layers
        self._last: Tensor | None = None  # within a pass: column of each row's last token
        # Prompts of one pass end in different columns, which `logits_to_keep` cannot say. Picking
        # also copies: a bf16 matrix product of a strided view is 40 to 600 times slower on CPU
        # (torch 2.13: 12 s against 38 ms for 16 rows and a vocabulary of 49,152).
        head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        head.register_forward_pre_hook(lambda _, args: (self._pick(args[0]), *args[1:]))
        self.seconds_total = 0.0
        self.failed_readings = 0  # passes whose readings could not be taken

    @property
    def meter_seconds_total(self) -> float:
        return self.meter.seconds_total if self.meter else 0.0

    def new_cache(self, rows: int = 0) -> BatchCache:
        return BatchCache(self.num_layers, rows=rows, device=self.device, longest=self._longest)

    def __call__(
        self,
        token_ids: Sequence[Sequence[int]],
        cache: BatchCache,
        taps: Sequence[Tap],
        *,
        read_all: bool = False,
    ) -> Tensor:
        """Feed each row of `cache` its next token ids; shorter lists are padded on the right.

        Returns `[rows, vocab]` logits of each row's last token (of the padding's first where a row
        has none), in the model's dtype. The meter reads that token too, or all with `read_all`.
        """
        started = time.perf_counter()
        counts = [len(row) for row in token_ids]
        tokens = max(counts)
        ids = torch.tensor(
            [[*row, *[0] * (tokens - len(row))] for row in token_ids], device=self.device
        )
        self._last = torch.tensor(counts, device=self.device).sub_(1).clamp_(min=0)
        mask, positions = cache.open(tokens)
        inputs: dict[str, object] = {"position_ids": positions} if self._takes_positions else {}
        if self.meter is not None:
            starts = torch.arange(0, len(counts) * tokens, tokens, device=self.device)
            self.meter.begin(
                [(tap.probe or 0, tap.alpha) for tap in taps],
                only=None if read_all or tokens == 1 else starts + self._last,
            )
        with stored(cache.stored):
            logits = self._model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **inputs,
            ).logits
        self._last = None
        cache.close(counts)
        self.seconds_total += time.perf_counter() - started
        last: Tensor = logits[:, 0]
        return last

    def _pick(self, hidden: Tensor) -> Tensor:
        """`[rows, tokens, hidden]` -> `[rows, 1, hidden]`: each row's last token."""
        if self._last is None:
            return hidden
        return hidden[torch.arange(len(hidden), device=hidden.device), self._last][:, None]

    def readings(self, taps: Sequence[Tap], *, columns: int) -> list[list[tuple[float, ...]]]:
        """Head logits of the pass that just ran, which read `columns` columns: `[row][column]`.

        `()` for rows without a probe. The meter never breaks a step: if it fails, the readings are
        NaN ("not scored") and the failure is logged and counted.
        """
        meter = self.meter
        if meter is None or all(tap.probe is None for tap in taps):
            return [[()] * columns for _ in taps]
        started = time.perf_counter()
        parts = [slice(0) if tap.probe is None else meter.head_slice(tap.probe) for tap in taps]
        try:
            table = meter.logits().tolist()
        except Exception:
            logger.exception("the meter failed; the tokens of this pass are not scored")
            self.failed_readings += 1
            return [[(math.nan,) * (part.stop - (part.start or 0))] * columns for part in parts]
        finally:
            self.seconds_total += time.perf_counter() - started
        return [
            [tuple(values[part]) for values in row] for row, part in zip(table, parts, strict=True)
        ]

    def contributions(self, tap: Tap, *, row: int, column: int, k: int) -> tuple[Contribution, ...]:
        """Largest contributions to the token head in the pass whose readings were taken.

        `column` counts those that were read.
        """
        assert self.meter is not None
        assert tap.probe is not None
        found = self.meter.contributions(tap.probe, row, column, k)
        return tuple(Contribution(*entry) for entry in found)
