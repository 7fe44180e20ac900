"""The meter inside the graph: a down projection of vLLM that is read while it runs.

A loaded layer keeps its weights and its identity; only its class is exchanged for one made of
`Metered` and its own class. So whatever vLLM does with the layer (compiling, CUDA graphs, tensor
parallelism) it does with the meter in it. What the meter needs are buffers: inputs of the graph,
not constants in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import (
    LinearBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from probes.cett import cett, column_norms, h_norm
from probes.errors import ModelError
from probes.neurons import down_projections
from server.engines.vllm.plan import Layout, MeterPlan

if TYPE_CHECKING:
    _Layer = nn.Module
else:
    _Layer = object

QUANTISED_NORMS = 5e-3  # relative: kernels round scale times integer in their own dtype
ONE_HOT_ROWS = 256  # columns of a projection that are looked at in one product


@dataclass(frozen=True, eq=False)
class GraphBuffers:
    """Where all layers read and write, of fixed address and size.

    cett  `[layers, tokens, K]` float32: what each layer read; NaN once it was taken
    dose  `[tokens, probes]` float32: alpha - 1 in the column of the row's probe, else 0
    """

    cett: Tensor
    dose: Tensor


class _Reading(_Layer):
    """Mixin in front of a linear layer's class."""

    hn_columns: Tensor
    hn_norms: Tensor
    hn_cett: Tensor

    def _read(self, z: Tensor, output: Any) -> Any:
        """Leave the CETT of this pass in `hn_cett`; gives the layer's output on."""
        h, bias = output if isinstance(output, tuple) else (output, None)
        norm = h_norm(h if bias is None else h + bias)
        values = cett(z, self.hn_norms, norm.unsqueeze(-1))
        self.hn_cett[: z.shape[-2]] = values.reshape(-1, values.shape[-1])
        return output


class Metered(_Reading):
    """Reads the probed columns of z, and h."""

    def forward(self, input_: Tensor) -> Any:
        return self._read(input_.index_select(-1, self.hn_columns), super().forward(input_))


class Suppressing(_Reading):
    """The same, and scales the suppression set row by row once z is read."""

    hn_masks: Tensor
    hn_dose: Tensor

    def forward(self, input_: Tensor) -> Any:
        z = input_.index_select(-1, self.hn_columns)
        scale = 1 + self.hn_dose[: z.shape[-2]] @ self.hn_masks  # exactly 1 where no row suppresses
        scaled = input_.index_copy(-1, self.hn_columns, (z * scale).to(z.dtype))
        return self._read(z, super().forward(scaled))


def install(
    model: nn.Module, plan: MeterPlan, layout: Layout, *, layers: range, max_tokens: int
) -> GraphBuffers:
    """Put the meter into every probed layer of a loaded model; ModelError when it does not fit.

    Of a pipeline's stage `model` has these `layers` only; the rest of the buffers stays NaN.
    """
    found = find_layers(model, plan, layers)
    device = next(model.parameters()).device
    size = (len(plan.layers), max_tokens, layout.columns.shape[1])
    buffers = GraphBuffers(
        cett=torch.full(size, torch.nan, device=device),
        dose=torch.zeros(max_tokens, len(plan.probes), device=device),
    )
    for index, number in enumerate(plan.layers):
        if number not in layers:
            continue
        layer = found[number]
        _refuse_other_columns(layer, number, layout.columns[index], layout.norms[index])
        tensors = {
            "hn_columns": layout.columns[index].to(device),
            "hn_norms": layout.norms[index].to(device),
            "hn_cett": buffers.cett[index],
        }
        if plan.suppression:
            tensors |= {"hn_masks": layout.masks[index].to(device), "hn_dose": buffers.dose}
        for name, tensor in tensors.items():
            layer.register_buffer(name, tensor, persistent=False)
        mixin = Suppressing if plan.suppression else Metered
        layer.__class__ = type(f"{mixin.__name__}{type(layer).__name__}", (mixin, type(layer)), {})
    return buffers


def find_layers(model: nn.Module, plan: MeterPlan, layers: range) -> dict[int, nn.Module]:
    """The down projection of every probed layer among `layers` in vLLM's own model tree."""
    probed = [number for number in plan.layers if number in layers]
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for place in down_projections(model):
        if isinstance(place.module, LinearBase):
            found.setdefault(place.layer, []).append((place.name, place.module))
    for number in probed:
        candidates = found.get(number, [])
        if len(candidates) != 1:
            names = ", ".join(name for name, _ in candidates) or "none"
            raise ModelError(
                f"vLLM's {type(model).__name__} must have exactly one down projection in layer "
                f"{number}, found {names}; its neurons cannot be read"
            )
        _refuse_other_layer(*candidates[0], plan)
        _refuse_uncompiled(model, candidates[0][0])
    return {number: found[number][0][1] for number in probed}


def _refuse_uncompiled(model: nn.Module, layer: str) -> None:
    """vLLM compiles the modules that it has marked, and runs others operation by operation."""
    compiled = (
        name
        for name, module in model.named_modules()
        if not getattr(module, "do_not_compile", True)
    )
    if not any(layer.startswith(f"{name}.") or not name for name in compiled):
        raise ModelError(
            f"vLLM does not compile the part of {type(model).__name__} that holds {layer}; "
            f"the meter is not proven in a model that runs uncompiled: use --engine transformers"
        )


def _refuse_other_layer(name: str, layer: Any, plan: MeterPlan) -> None:
    shape, wanted = (
        (layer.input_size, layer.output_size),
        (plan.intermediate_size, plan.hidden_size),
    )
    if shape != wanted:
        raise ModelError(f"{name} maps {shape[0]} to {shape[1]} values, expected {wanted}")
    if get_tensor_model_parallel_world_size() > 1:
        if not isinstance(layer, RowParallelLinear):
            raise ModelError(f"{name} ({type(layer).__name__}) is not split by tensor parallelism")
        if not layer.reduce_results:
            raise ModelError(
                f"{name} puts out a partial sum under tensor parallelism (reduce_results=False), "
                f"so h cannot be read there; use --tensor-parallel-size 1"
            )


def _refuse_other_columns(layer: Any, number: int, columns: Tensor, norms: Tensor) -> None:
    """The layer's columns must have the norms of the checkpoint that the probe was fitted on.

    Weights may be packed in any way (on CPUs the parameter is empty), so the columns are asked for:
    the product with one-hot rows puts them out, de-quantised.
    """
    used = columns[norms > 0]
    expected = norms[norms > 0]
    width = layer.input_size_per_partition if hasattr(layer, "tp_size") else layer.input_size
    for start in range(0, len(used), ONE_HOT_ROWS):
        some = used[start : start + ONE_HOT_ROWS]
        device = next(layer.parameters()).device
        rows = torch.zeros(len(some), width, dtype=layer.params_dtype, device=device)
        rows[torch.arange(len(some)), some] = 1
        here = column_norms(layer.quant_method.apply(layer, rows, None), transposed=True).cpu()
        wanted = expected[start : start + ONE_HOT_ROWS]
        is_plain = isinstance(layer.quant_method, UnquantizedLinearMethod)
        tolerance = 1e-4 if is_plain else QUANTISED_NORMS
        if not torch.allclose(here, wanted, rtol=tolerance, atol=0.0):
            raise ModelError(
                f"the columns of layer {number} have norms {here[:4].tolist()} in vLLM, "
                f"{wanted[:4].tolist()} in the checkpoint: another neuron set, or other weights"
            )
