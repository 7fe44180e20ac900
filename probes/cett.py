"""The formula, once: CETT of a neuron at a token (H-Neurons, arXiv 2512.01797, section 2).

    cett[t, j] = |z[t, j]| * ||W_down[:, j]||2 / (||h[t]||2 + 1e-8)

`z` is the input of the FFN's down projection and `h` its output, exactly as the layer puts it out.
Training (every neuron) and serving (a probe's neurons) both call `cett`: no skew by construction.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMULA_VERSION = 1
EPSILON = 1e-8


def h_norm(h: Tensor) -> Tensor:
    """L2 norm of the FFN output: `[..., hidden]` any dtype -> `[...]` float32."""
    norm: Tensor = torch.linalg.vector_norm(h, dim=-1, dtype=torch.float32)
    return norm


def cett(z: Tensor, column_norm: Tensor, norm: Tensor) -> Tensor:
    """Contribution of each neuron relative to its layer's output, float32, >= 0.

    z            `[..., tokens, neurons]`  any dtype, before suppression
    column_norm  `[neurons]` float32, L2 norm of each neuron's down-projection column
    norm         `[..., tokens, 1 or neurons]` float32, `h_norm` of the neuron's layer

    Arithmetic is float32 whatever the model's dtype: bf16 quotients differ by up to 0.8 % (p99).
    """
    return z.float().abs() * column_norm / (norm + EPSILON)


def column_norms(weight: Tensor, *, transposed: bool = False) -> Tensor:
    """Norms of the down projection's columns, `[neurons]` float32.

    `weight` is `[hidden, neurons]` (nn.Linear), or `[neurons, hidden]` when `transposed`
    (GPT-2's Conv1D stores it the other way round).
    """
    norms: Tensor = torch.linalg.vector_norm(
        weight, dim=1 if transposed else 0, dtype=torch.float32
    )
    return norms
