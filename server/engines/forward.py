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
from server.engines.attention import padded
from server.engines.base import Contribution
from server.engines.cache import BatchCache

logger = logging.getLogger(__name__)


class Tap(NamedTuple):
    """What one row of a pass wants from the meter."""

    probe: int | None = None  # index of its probe; None: not read
    alpha: float = 1.0


class Forward:
    """The model as the scheduler sees it: token ids in, next-token logits and readings out."""

    def __init__(self, model: PreTrainedModel, meter: Meter | None) -> None:
        self._model = model
        self._meter = meter
        self.device = model.device
        takes = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in takes
        self._keeps_logits = "logits_to_keep" in takes
        self.num_layers: int = model.config.get_text_config().num_hidden_layers
        # The last column of a batch of prompts is a strided view, and a bf16 matrix product of a
        # strided input is 40 to 600 times slower on CPU (torch 2.13: 12 s against 38 ms for 16
        # rows and a vocabulary of 49,152). Where the input is contiguous this does nothing.
        head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
        self.seconds_total = 0.0
        self.failed_readings = 0  # passes whose readings could not be taken

    @property
    def meter_seconds_total(self) -> float:
        return self._meter.seconds_total if self._meter else 0.0

    def new_cache(self, first: Sequence[int] = ()) -> BatchCache:
        return BatchCache(self.num_layers, first=first, device=self.device)

    def __call__(
        self, token_ids: Sequence[Sequence[int]], cache: BatchCache, taps: Sequence[Tap]
    ) -> Tensor:
        """Feed `[rows, tokens]` token ids behind what `cache` stores.

        Returns `[rows, vocab]` logits of the last column, in the model's dtype.
        """
        started = time.perf_counter()
        ids = torch.tensor(token_ids, device=self.device)
        tokens = ids.shape[1]
        mask, positions = cache.open(tokens)
        inputs: dict[str, object] = {"position_ids": positions} if self._takes_positions else {}
        if self._keeps_logits:
            inputs["logits_to_keep"] = 1
        if self._meter is not None:
            self._meter.begin([(tap.probe or 0, tap.alpha) for tap in taps])
        with padded(cache.paddings):
            logits = self._model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **inputs,
            ).logits
        cache.close(tokens)
        self.seconds_total += time.perf_counter() - started
        last: Tensor = logits[:, -1]
        return last

    def readings(self, taps: Sequence[Tap], *, last: int) -> list[list[tuple[float, ...]]]:
        """Head logits of the `last` columns of the pass that just ran: `[row][column]`.

        `()` for rows without a probe. The meter never breaks a step: if it fails, the readings are
        NaN ("not scored") and the failure is logged and counted.
        """
        meter = self._meter
        if meter is None or all(tap.probe is None for tap in taps):
            return [[()] * last for _ in taps]
        started = time.perf_counter()
        parts = [slice(0) if tap.probe is None else meter.head_slice(tap.probe) for tap in taps]
        try:
            table = meter.logits()[:, -last:].tolist()
        except Exception:
            logger.exception("the meter failed; the tokens of this pass are not scored")
            self.failed_readings += 1
            return [[(math.nan,) * (part.stop - (part.start or 0))] * last for part in parts]
        finally:
            self.seconds_total += time.perf_counter() - started
        return [
            [tuple(values[part]) for values in row] for row, part in zip(table, parts, strict=True)
        ]

    def contributions(self, tap: Tap, *, row: int, column: int, k: int) -> tuple[Contribution, ...]:
        """Largest contributions to the token head in the pass whose readings were taken.

        `column` counts from the end of the pass: -1 is the last.
        """
        assert self._meter is not None
        assert tap.probe is not None
        found = self._meter.contributions(tap.probe, row, column, k)
        return tuple(Contribution(*entry) for entry in found)
