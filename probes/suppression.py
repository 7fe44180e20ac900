"""Alpha: `z' = alpha * z` on a probe's suppression set, at the input of the down projection.

Changes what the model says (compliance); it is no cure for hallucinations (docs, science).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def scales(alphas: Sequence[float], masks: Tensor) -> Tensor:
    """Factor of each neuron in each row: `[rows]` alphas, `[rows, neurons]` bool -> float32.

    `1 + (alpha - 1) * mask` is exactly 1 at alpha 1 and outside the mask, exactly 0 at alpha 0.
    """
    for alpha in alphas:
        if not math.isfinite(alpha) or alpha < 0:
            raise ValueError(f"alpha must be a finite number >= 0, not {alpha!r}")
    column = torch.tensor(alphas, dtype=torch.float32, device=masks.device).unsqueeze(-1)
    return 1 + (column - 1) * masks


def suppress(z: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """A copy of `z` whose `columns` are multiplied row by row; non-finite values stay non-finite.

    z        `[rows, tokens, neurons]`, or flattened `[rows * tokens, neurons]` (OPT)
    columns  `[chosen]` int64, each at most once: index_copy has no winner among duplicates
    scale    `[rows, chosen]` float32
    """
    if z.dim() == 3 and z.shape[0] != scale.shape[0]:
        raise ValueError(f"{scale.shape[0]} alphas were given for a batch of {z.shape[0]} rows")
    chosen = z.index_select(-1, columns)
    by_row = chosen.reshape(scale.shape[0], -1, scale.shape[1])
    scaled = (by_row * scale.unsqueeze(1)).to(z.dtype)  # the product is float32: rounded once
    return z.index_copy(-1, columns, scaled.reshape(chosen.shape))
