"""Attention over rows of different lengths: one call per layer, exact on a CPU, no copies of keys.

The cache keeps every row from column 0 on and pads on the right, up to a multiple of `BLOCK`
columns. Two things are done otherwise than by the library's `sdpa`, for models that let their
attention be chosen (docs/decisions/batching.md has the figures):

* **Masked by row.** The library has one query offset for all rows. Here a query's position is its
  own row's, which causality and sliding windows need. What stands right of it is masked.
* **Grouped.** The library copies keys and values once per query head before it attends, at every
  layer and step. With one query token per row the heads of a group can stand where a sequence of
  queries would, and attend to the stored keys as they are.

Why the padding is on the right: the CPU kernel adds up a row in vectors of 16 columns, so zeros
behind a row change no bit, and a request computes the same bits alone and beside others. Padding on
the left moves the row inside the vectors, and bfloat16 then rounds differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "hneurons_sdpa"
BLOCK = 16  # columns: float32 lanes of the widest vectors that CPU kernels add up in (AVX-512)

# Of the pass that runs in this thread: how many tokens of each row are stored, `[rows]` int64.
_stored: ContextVar[Tensor | None] = ContextVar("_stored", default=None)


def use_batch_attention(model: PreTrainedModel) -> bool:
    """Let `model` attend as described above where it would use `sdpa`; False where it stays as
    it is, because its attention is its own code."""
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    model.set_attn_implementation(NAME)
    return True


@contextmanager
def stored(lengths: Tensor) -> Iterator[None]:
    """Within: a pass over rows of which `lengths` `[rows]` int64 tokens are stored."""
    token = _stored.set(lengths)
    try:
        yield
    finally:
        _stored.reset(token)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable[..., Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **kwargs: Any,  # noqa: ANN401  # the library's own; used outside a pass
) -> Tensor | None:
    """What is added to the scores, `[rows, 1, tokens, columns]` in `dtype`: 0, or -inf where
    `mask_function(batch, head, query position, column)` forbids; signature of `sdpa_mask`.

    Made once per pass. The library's bool mask is turned into this at every layer.
    """
    lengths = _stored.get()
    if lengths is None:
        kwargs.update(mask_function=mask_function, dtype=dtype, device=device)
        return sdpa_mask(batch_size, q_length, kv_length, **kwargs)
    positions = lengths[:, None] + torch.arange(q_length, device=device)
    allowed = mask_function(
        torch.arange(batch_size, device=device)[:, None, None, None],
        torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device),
        positions[:, None, :, None],
        torch.arange(kv_length, device=device)[None, None, None, :],
    )
    added = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return added.masked_fill_(~allowed, -torch.inf)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,  # noqa: ANN401  # whatever the model passes on to the library
) -> tuple[Tensor, None]:
    """Signature and result of the library's `sdpa_attention_forward`.

    query           `[rows, heads, tokens, head_dim]`
    key, value      `[rows, kv_heads, columns, head_dim]`
    attention_mask  `[rows, 1, tokens, columns]` bool or added to the scores; None: causal
    softcap         of the scores, as Gemma 2 has it; the library's own sdpa leaves it out
    returns         `[rows, tokens, heads, head_dim]`
    """
    rows, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    if softcap is not None:
        return _attend_capped(query, key, value, attention_mask, scaling, softcap), None
    # A position bias is per query head: the heads of a group cannot share one mask then.
    if tokens != 1 or kv_heads == heads or kwargs.get("position_bias") is not None:
        output: Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )[0]
        return output, None
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    output = scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(rows, 1, heads, value.shape[-1]), None


def _attend_capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """As transformers' `eager_attention_forward` of Gemma 2: no fused kernel caps scores."""
    rows, heads, tokens, head_dim = query.shape
    kv_heads, columns = key.shape[1:3]
    grouped = query.reshape(rows, kv_heads, heads // kv_heads * tokens, head_dim)
    scores = (grouped @ key.mT).reshape(rows, heads, tokens, columns)
    scores = torch.tanh(scores * (head_dim**-0.5 if scaling is None else scaling) / softcap)
    scores = scores * softcap
    if attention_mask is None:
        attention_mask = torch.ones(tokens, columns, dtype=torch.bool, device=query.device).tril(
            columns - tokens
        )
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    else:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    mixed = weights.reshape(rows, kv_heads, -1, columns) @ value
    return mixed.reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous()
