"""Where the neurons are: the FFN down projection of every layer of a text decoder, or a refusal.

Knows module trees and no model library: a projection is recognised by its last name, its shape and
its place. The place is a numbered block of the text decoder, outside attention; the layer number is
parsed from the name, never counted.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from probes.cett import column_norms
from probes.errors import ModelError

# llama, mistral, qwen, gemma, phi3, olmo; gpt2, starcoder2; opt, phi; neox, falcon, bloom; gpt-j
DOWN_NAMES = frozenset({"down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out"})

_BLOCK = re.compile(r"^(?P<stack>.*?)\.?(?P<layer>\d+)\.(?P<inner>.+)$")
_ATTENTION = re.compile(r"attn|attention")
_OTHER_TOWER = re.compile(r"vision|visual|image|audio|speech")
_EXPERTS = re.compile(r"(^|[._])(shared_)?experts?($|[._])")
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer)($|\.)")  # what peft puts around a linear
_READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TextConfig(Protocol):
    """What is asked of a model's configuration; transformers' classes have it."""

    num_hidden_layers: int
    hidden_size: int
    vocab_size: int

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, eq=False)
class FFN:
    """One feed-forward network: `module` maps z `[..., neurons]` to h `[..., hidden]`."""

    layer: int  # 0-based, parsed from the name
    name: str  # qualified name of the module
    module: nn.Module  # the down projection
    intermediate_size: int  # neurons
    hidden_size: int
    transposed: bool  # weight is [neurons, hidden] (Conv1D) instead of [hidden, neurons]

    @property
    def weight(self) -> Tensor:
        """`[hidden, neurons]`, or `[neurons, hidden]` when transposed; the model's dtype."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def column_norms(self) -> Tensor:
        """`[neurons]` float32, on the device of the layer."""
        return column_norms(self.weight.detach(), transposed=self.transposed)


class Place(NamedTuple):
    """A module whose name and place are those of a down projection."""

    stack: str  # name of the list of blocks it belongs to
    layer: int
    name: str
    module: nn.Module


def down_projections(model: nn.Module) -> Iterator[Place]:
    """Every module that is named as a down projection, outside attention and other towers.

    Looks at names only: weights may be packed, sharded or absent. `find_ffns` checks them.
    """
    for name, module in model.named_modules():
        block = _BLOCK.match(name)
        if block is None or name.rpartition(".")[2] not in DOWN_NAMES:
            continue
        if _ATTENTION.search(block["inner"]) or _OTHER_TOWER.search(block["stack"]):
            continue
        yield Place(block["stack"], int(block["layer"]), name, module)


def find_ffns(model: nn.Module) -> tuple[FFN, ...]:
    """Down projections of layers 0 .. L-1, exactly one each.

    `model` is a decoder-only language model, or a multimodal one that contains such a decoder; its
    `config` tells the number of layers and the hidden size. Raises ModelError when a layer has no
    or several candidates, for mixtures of experts, adapters, quantised or offloaded weights.
    """
    config = text_config(model)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    _refuse_unsupported(model)

    stacks: dict[str, list[FFN]] = defaultdict(list)
    for place in down_projections(model):
        stacks[place.stack].append(_ffn(place, hidden=hidden))
    if len(stacks) != 1:
        found = ", ".join(f"{stack or '(root)'}.*" for stack in sorted(stacks)) or "none"
        raise ModelError(
            f"expected one stack of {layers} decoder layers with a down projection named "
            f"{' or '.join(sorted(DOWN_NAMES))} each, found {found} in {type(model).__name__}"
        )
    ffns = sorted(next(iter(stacks.values())), key=lambda ffn: ffn.layer)
    if [ffn.layer for ffn in ffns] != list(range(layers)):
        raise ModelError(
            f"expected exactly one FFN down projection in each of layers 0..{layers - 1}, found "
            f"{', '.join(ffn.name for ffn in ffns)}"
        )
    sizes = {ffn.intermediate_size for ffn in ffns}
    if len(sizes) != 1:
        raise ModelError(
            f"expected FFNs of one width in every layer, found widths {sorted(sizes)}: "
            f"layers of different width are not supported"
        )
    return tuple(ffns)


def text_config(model: nn.Module) -> TextConfig:
    """The configuration of the text decoder: the model's, or its `text_config` (multimodal)."""
    config = getattr(model, "config", None)
    text: Any = getattr(config, "text_config", None) or config
    for wanted in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if not isinstance(getattr(text, wanted, None), int):
            raise ModelError(
                f"{type(model).__name__} has no configuration with an integer {wanted}; "
                f"pass a language model that carries its `config`"
            )
    if getattr(text, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder model; only decoder-only language "
            f"models are supported"
        )
    decoder: TextConfig = text
    return decoder


def _ffn(place: Place, *, hidden: int) -> FFN:
    name, module = place.name, place.module
    transposed = type(module).__name__ == "Conv1D"
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.dtype not in _READABLE:
        kind = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else "none"
        raise ModelError(
            f"{name} has no plain floating-point weight matrix (found {kind}); packed "
            f"weights must be de-quantised: load the model in float32, bfloat16 or float16"
        )
    if weight.is_meta:
        raise ModelError(f"{name} is offloaded (meta device); load the whole model into memory")
    out_size, in_size = reversed(weight.shape) if transposed else weight.shape
    if out_size != hidden:
        raise ModelError(
            f"{name} puts out {out_size} values, expected the hidden size {hidden}: "
            f"this is not the down projection of a decoder layer"
        )
    return FFN(
        layer=place.layer,
        name=name,
        module=module,
        intermediate_size=in_size,
        hidden_size=out_size,
        transposed=transposed,
    )


def _refuse_unsupported(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if _ADAPTER.search(name):
            raise ModelError(
                f"{name} belongs to an adapter (LoRA); a probe reads one set of weights: merge the "
                f"adapter into the model and fit a probe on the result"
            )
        if _EXPERTS.search(name) or "Experts" in type(module).__name__:
            raise ModelError(
                f"{name} ({type(module).__name__}) belongs to a mixture of experts, whose neurons "
                f"cannot be read one FFN per layer; use a dense model"
            )
