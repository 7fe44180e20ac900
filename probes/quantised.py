"""Which quantised checkpoints can be probed: those whose weights alone are quantised.

Every weight of such a model is a number on a grid, and every product is that of these numbers: a
reader of the de-quantised weights computes what a kernel for packed ones computes, to the rounding
of its dtype. Where activations are quantised, too, h is rounded by a rule that only the kernel
knows, and a probe would be calibrated on numbers that are never served.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from probes.errors import ModelError

METHOD = "compressed-tensors"
BITS = (4, 8)
_REMEDY = (
    "use the weights in bfloat16, float16 or float32, or quantised to 4 or 8 bits by " + METHOD
)
# What compressed-tensors leaves on a layer whose weights it has de-quantised.
_LEFT = ("forward", "quantization_scheme", "quantization_status", "quantization_enabled")


def quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint's config.json (`compression_config` in old ones);
    empty for plain weights."""
    for holder in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if holder.get(key):
                return dict(holder[key])
    return {}


def refuse_unproven(model: str, quantised: Mapping[str, Any]) -> None:
    """ModelError unless `quantised`, the `quantization_config` of a checkpoint, says that weights
    alone are quantised, to integers, in the format compressed-tensors."""
    method = quantised.get("quant_method", "unknown method")
    if method != METHOD:
        raise ModelError(
            f"{model} is quantised ({method}); that its neurons are those of the checkpoint is "
            f"proven for no such method: {_REMEDY}"
        )
    groups: dict[str, Any] = quantised.get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values()]
    reasons = {
        "activations are quantised, too": any(
            group.get("input_activations") or group.get("output_activations")
            for group in groups.values()
        ),
        "keys and values are quantised": bool(quantised.get("kv_cache_scheme")),
        "activations are rotated": bool(quantised.get("transform_config")),
        "it names no groups of layers": not groups,
        "weights are no integers of 4 or 8 bits": any(
            (one.get("type"), one.get("num_bits")) not in {("int", bits) for bits in BITS}
            for one in weights
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ModelError(f"{model} is quantised by {method} and {reason}: {_REMEDY}")


def ask_for_plain(config: object) -> None:
    """`config`, transformers' of a checkpoint, asks for de-quantised weights from now on."""
    for holder in (config, getattr(config, "text_config", None)):
        settings = getattr(holder, "quantization_config", None)
        if isinstance(settings, dict):
            settings["dequantize"] = True


def make_plain(model: nn.Module) -> None:
    """Leave the de-quantised weights of a loaded model and nothing else of its quantisation: no
    scales among its parameters, no rounding in its layers."""
    for module in model.modules():
        if not hasattr(module, "quantization_scheme"):
            continue
        for name in [n for n in module._parameters if n not in ("weight", "bias")]:
            delattr(module, name)
        for name in _LEFT:
            module.__dict__.pop(name, None)
