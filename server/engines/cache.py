"""Keys and values of a batch whose rows come and go; knows no request and no scheduling.

Rows are right-aligned: all of them end at the same column, so that one step appends one column for
the whole batch, and a row's padding stands on its left.

    column   start                end
    row 0      . . . . a b c d e f          first[0] = start + 4
    row 1      g h i j k l m n o p          first[1] = start
    row 2      . . . . . . . . q r          first[2] = start + 8

The position of a row's token is `column - first[row]`. Distances between columns are distances
between positions, which is what rotary, learned and alibi positions and sliding windows need.

Invariant: left of `first[row]` a row holds zeros. Masked columns are multiplied by a weight of
zero, and zero times a stale NaN would be NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

COLUMN_STEP = 256  # columns are allocated in multiples of this


class BatchCache(Cache):
    """One preallocated buffer per layer, `[rows, heads, columns, head_dim]`, written in place."""

    def __init__(self, num_layers: int, *, first: Sequence[int] = (), device: torch.device) -> None:
        """`first[row]` is the column of the row's first token; every row begins without tokens."""
        self.first = list(first)
        self.start = min(self.first, default=0)
        self.end = self.start
        self.columns = 0  # allocated
        self.device = device
        self._layers = [_Layer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self._layers))

    @property
    def rows(self) -> int:
        return len(self.first)

    @property
    def paddings(self) -> list[int]:
        """How many columns of each row, from `start` on, are padding."""
        return [first - self.start for first in self.first]

    def length(self, row: int) -> int:
        """How many tokens of `row` are stored."""
        return max(0, self.end - self.first[row])

    def open(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Make room for `tokens` more columns.

        Returns the attention mask `[rows, stored + tokens]` int64 (1 is a token, 0 is padding) and
        the position ids `[rows, tokens]` int64 of the pass that will fill them.
        """
        if self.end + tokens > self.columns:
            self._rebuild(rows=self.rows, stored=self.end - self.start, columns=tokens)
        first = torch.tensor(self.first, device=self.device)[:, None]
        columns = torch.arange(self.start, self.end + tokens, device=self.device)[None, :]
        positions = columns - first
        mask = (positions >= 0).to(torch.int64)
        return mask, positions[:, -tokens:].clamp(min=0)

    def close(self, tokens: int) -> None:
        """The pass has filled `tokens` columns in every layer."""
        self.end += tokens

    def admit(self, other: BatchCache, rows: Sequence[int]) -> None:
        """Append `rows` of `other` to this batch."""
        stored = max(self.end - self.start, *(other.length(row) for row in rows))
        slots = self.rows + len(rows)
        if stored > self.end or slots > self._slots():
            self._rebuild(rows=slots, stored=stored, columns=1, like=other)
        for row in rows:
            length = other.length(row)
            for mine, its in zip(self._layers, other._layers, strict=True):
                for to, source in ((mine.keys, its.keys), (mine.values, its.values)):
                    to[self.rows, :, : self.end - length] = 0
                    to[self.rows, :, self.end - length : self.end] = source[
                        row, :, other.end - length : other.end
                    ]
            self.first.append(self.end - length)
        self.start = min(self.first)

    def retire(self, row: int) -> None:
        """Drop `row`; the last row takes its place. Columns that nobody needs are trimmed."""
        last = self.rows - 1
        if row != last:
            for layer in self._layers:
                for buffer in (layer.keys, layer.values):
                    buffer[row, :, : self.end] = buffer[last, :, : self.end]
            self.first[row] = self.first[last]
        self.first.pop()
        self.start = min(self.first, default=0)
        if not self.first:
            self.end = 0

    def _slots(self) -> int:
        first = self._layers[0]
        return first.keys.shape[0] if first.is_initialized else 0

    def _rebuild(
        self, *, rows: int, stored: int, columns: int, like: BatchCache | None = None
    ) -> None:
        """Move what is stored into buffers for `rows` rows and `stored + columns` columns or more.

        Afterwards the stored columns end at `stored`. Half as many columns again are allocated, so
        that the cost of moving stays a constant share of a step.
        """
        wanted = stored + columns
        self.columns = -(-(wanted + wanted // 2) // COLUMN_STEP) * COLUMN_STEP
        shift = stored - self.end
        slots = max(rows, self._slots())
        for index, layer in enumerate(self._layers):
            layer.move(
                slots=slots,
                columns=self.columns,
                shift=shift,
                like=layer if like is None or layer.is_initialized else like._layers[index],
            )
        self.first = [column + shift for column in self.first]
        self.start += shift
        self.end += shift


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's part; where to write is said by the batch."""

    keys: Tensor  # [rows, heads, columns, head_dim], once initialized
    values: Tensor

    is_sliding = False  # windows are masked, not cut: rows of one batch reach back differently far

    def __init__(self, batch: BatchCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch = batch

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch = self.batch
        self.keys, self.values = (
            states.new_zeros(batch.rows, states.shape[1], batch.columns, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write `[rows, heads, tokens, head_dim]` at the open columns; return what is stored."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, stop = self.batch, self.batch.end + key_states.shape[2]
        self.keys[: batch.rows, :, batch.end : stop] = key_states
        self.values[: batch.rows, :, batch.end : stop] = value_states
        stored = (slice(0, batch.rows), slice(None), slice(batch.start, stop))
        return self.keys[stored], self.values[stored]

    def move(self, *, slots: int, columns: int, shift: int, like: _Layer) -> None:
        """Reallocate; column `c` becomes column `c + shift`."""
        if not like.is_initialized:
            return
        start, end = self.batch.start, self.batch.end
        moved = []
        for old, shape in ((self.keys, like.keys), (self.values, like.values)):
            new = shape.new_zeros(slots, shape.shape[1], columns, shape.shape[3])
            if self.is_initialized and end > start:
                new[: old.shape[0], :, start + shift : end + shift] = old[:, :, start:end]
            moved.append(new)
        self.keys, self.values = moved
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.batch.end - self.batch.start

    def get_max_length(self) -> int:
        return -1
