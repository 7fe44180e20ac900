"""Attention over a padded batch: fast where heads share keys, and exact on a CPU.

Two things are done otherwise than by the library's `sdpa`, for models that let their attention be
chosen (docs/decisions/batching.md has the figures):

* **Grouped.** The library copies keys and values once per query head before it attends, at every
  layer and step. With one query token per row the heads of a group can stand where a sequence of
  queries would, and attend to the stored keys as they are.
* **Row by row, on a CPU.** A row attends to its own columns only. The kernel then sees what it sees
  when the request is alone, so a request's tokens and readings do not depend on its neighbours by
  one bit in bfloat16; masked padding moves the sums, and bfloat16 rounds them differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "hneurons_sdpa"

# Of the pass that runs in this thread: how many stored columns of each row are padding.
_paddings: ContextVar[Sequence[int]] = ContextVar("_paddings", default=())


def use_batch_attention(model: PreTrainedModel) -> None:
    """Let `model` attend with `attend` where it would use `sdpa`; others stay as they are."""
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


@contextmanager
def padded(paddings: Sequence[int]) -> Iterator[None]:
    """Within: a pass over rows whose first `paddings[row]` columns are padding."""
    token = _paddings.set(paddings)
    try:
        yield
    finally:
        _paddings.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,  # noqa: ANN401  # whatever the model passes on to the library
) -> tuple[Tensor, None]:
    """Signature and result of the library's `sdpa_attention_forward`.

    query           `[rows, heads, tokens, head_dim]`
    key, value      `[rows, kv_heads, columns, head_dim]`
    attention_mask  `[rows, 1, tokens, columns]` bool, or None: causal without padding
    returns         `[rows, tokens, heads, head_dim]`; zeros where the query is padding
    """
    rows, _, tokens, _ = query.shape
    paddings = _paddings.get()
    if query.device.type != "cpu" or not any(paddings) or attention_mask is None:
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs), None
    output = query.new_zeros(rows, tokens, query.shape[1], value.shape[-1])
    before = key.shape[2] - tokens  # columns that were stored before this pass
    for row, padding in enumerate(paddings):
        one, skip = slice(row, row + 1), max(0, padding - before)
        if skip < tokens:
            output[one, skip:] = _sdpa(
                module,
                query[one, :, skip:],
                key[one, :, padding:],
                value[one, :, padding:],
                attention_mask[one, :, skip:, padding:],
                dropout,
                scaling,
                **kwargs,
            )
    return output, None


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,  # noqa: ANN401
) -> Tensor:
    """The library's attention, save that one query token per row needs no copies of the keys."""
    rows, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    # A position bias is per query head: the heads of a group cannot share one mask then.
    if tokens != 1 or kv_heads == heads or kwargs.get("position_bias") is not None:
        output: Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )[0]
        return output
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    return scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    ).reshape(rows, 1, heads, value.shape[-1])
