"""Keys and values of a batch whose rows come and go; knows no request and no scheduling.

Rows are left-aligned: column and position of a token are the same number, and a row's padding
stands on its right (server/engines/attention.py says why).

    column   0                      columns
    row 0    a b c d e f . . . . . . . .      lengths[0] = 6
    row 1    g h i j k l m n o p . . . .      lengths[1] = 10
    row 2    q r . . . . . . . . . . . .      lengths[2] = 2

Invariant: right of its length a row holds finite numbers. Masked columns are multiplied by a weight
of zero, and zero times a stale NaN would be NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from server.engines.attention import BLOCK

COLUMN_STEP = 256  # columns are allocated in multiples of this

# Keys and values of one row, `[heads, tokens, head_dim]` each, of every layer.
States: TypeAlias = tuple[tuple[Tensor, Tensor], ...]


class BatchCache(Cache):
    """One preallocated buffer per layer, `[rows, heads, columns, head_dim]`, written in place."""

    def __init__(
        self,
        num_layers: int,
        *,
        rows: int = 0,
        device: torch.device,
        longest: int | None = None,
    ) -> None:
        """`rows` rows without tokens, of which none comes to hold more than `longest`."""
        self.longest = longest
        self.lengths = [0] * rows  # tokens of each row
        self.device = device
        self.stored = torch.zeros(rows, dtype=torch.int64, device=device)  # as the pass began
        self.columns = 0  # that the open pass attends to
        self.row_index = torch.arange(rows, device=device)
        self._layers = [_Layer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self._layers))

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def allocated(self) -> bool:
        """Whether it holds buffers."""
        return any(layer.is_initialized for layer in self._layers)

    def open(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Make room for `tokens` more tokens of every row; several only while rows are equally
        long.

        Returns the attention mask `[rows, columns]` int64 (1: a token that is stored or that this
        pass brings) and the position ids `[rows, tokens]` int64.
        """
        assert tokens == 1 or len(set(self.lengths)) == 1
        wanted = max(self.lengths) + tokens
        self.columns = -(-wanted // BLOCK) * BLOCK
        for layer in self._layers:
            layer.reserve(rows=self.rows, columns=self.columns)
        self.stored = torch.tensor(self.lengths, device=self.device)
        self.row_index = torch.arange(self.rows, device=self.device)
        columns = torch.arange(self.columns, device=self.device)
        mask = (columns < self.stored[:, None] + tokens).to(torch.int64)
        return mask, self.stored[:, None] + torch.arange(tokens, device=self.device)

    def close(self, counts: Sequence[int]) -> None:
        """The pass has brought `counts[row]` tokens of each row; the rest of it was padding."""
        self.lengths = [n + count for n, count in zip(self.lengths, counts, strict=True)]

    def admit(self, other: BatchCache, row: int) -> None:
        """Append `row` of `other` to this batch."""
        self.append(other.states(row), tokens=other.lengths[row])

    def states(self, row: int) -> States:
        """A view of what `row` holds."""
        stored = (row, slice(None), slice(0, self.lengths[row]))
        return tuple((layer.keys[stored], layer.values[stored]) for layer in self._layers)

    def append(self, states: States, *, tokens: int) -> None:
        """Add a row that begins with the first `tokens` tokens of `states`."""
        for layer, (keys, values) in zip(self._layers, states, strict=True):
            layer.reserve(rows=self.rows + 1, columns=tokens, like=(keys, values))
            layer.put(self.rows, keys[:, :tokens], values[:, :tokens])
        self.lengths.append(tokens)

    def retire(self, row: int) -> None:
        """Drop `row`; the last row takes its place."""
        last = self.rows - 1
        if row != last:
            length = self.lengths[last]
            for layer in self._layers:
                layer.put(row, layer.keys[last, :, :length], layer.values[last, :, :length])
            self.lengths[row] = length
        self.lengths.pop()


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's part; where to write is said by the batch."""

    keys: Tensor  # [rows, heads, columns, head_dim], once initialized
    values: Tensor

    is_sliding = False  # windows are masked, not cut: rows of one batch reach back differently far

    def __init__(self, batch: BatchCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch = batch

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, columns = self.batch.rows, _allocated(self.batch.columns)
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], columns, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write `[rows, heads, tokens, head_dim]` behind each row; return what is attended to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, tokens = self.batch, key_states.shape[2]
        if tokens == 1:
            at = (batch.row_index, slice(None), batch.stored)
            self.keys[at], self.values[at] = key_states[:, :, 0], value_states[:, :, 0]
        else:
            start = batch.lengths[0]
            self.keys[: batch.rows, :, start : start + tokens] = key_states
            self.values[: batch.rows, :, start : start + tokens] = value_states
        attended = (slice(0, batch.rows), slice(None), slice(0, batch.columns))
        return self.keys[attended], self.values[attended]

    def put(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Make `row` hold `[heads, tokens, head_dim]` and zeros behind it."""
        for buffer, states in ((self.keys, keys), (self.values, values)):
            tokens = states.shape[1]
            buffer[row, :, :tokens] = states
            buffer[row, :, tokens:] = 0

    def reserve(
        self, *, rows: int, columns: int, like: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Reallocate when the buffers are too small; `like`, keys and values `[heads, tokens,
        head_dim]`, says the shapes of the first ones.

        Half as many columns again are allocated, so that the cost of moving stays a constant share
        of a step.
        """
        if not self.is_initialized:
            if like is None:
                return  # the first pass brings the shapes
            self.keys, self.values = (
                states.new_zeros(0, states.shape[0], 0, states.shape[2]) for states in like
            )
            self.is_initialized = True
        had_rows, heads, had_columns, _ = self.keys.shape
        if rows <= had_rows and columns <= had_columns:
            return
        wide = had_columns if columns <= had_columns else self._ahead(columns)
        moved = []
        for old in (self.keys, self.values):
            new = old.new_zeros(max(rows, had_rows), heads, wide, old.shape[3])
            new[:had_rows, :, :had_columns] = old
            moved.append(new)
        self.keys, self.values = moved

    def _ahead(self, columns: int) -> int:
        """What is allocated where `columns` are wanted: what no row can fill is not."""
        ahead, longest = columns + columns // 2, self.batch.longest
        return _allocated(ahead if longest is None else max(columns, min(ahead, longest)))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.batch.columns, 0

    def get_seq_length(self) -> int:
        return max(self.batch.lengths, default=0)

    def get_max_length(self) -> int:
        return -1


def _allocated(columns: int) -> int:
    return -(-columns // COLUMN_STEP) * COLUMN_STEP
