"""Checkpoints whose weights are quantised, as llm-compressor writes them, and their plain twins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

# compressed-tensors imports a part of torch that warns of itself.
IMPORTS_OLD_TORCH = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method`:DeprecationWarning"
)


def quantise(folder: Path, twin: Path, *, bits: int = 4, group: int = 32) -> None:
    """Quantise the model in `folder` in place, and save what its numbers stand for in `twin`.

    group  weights of one scale
    The twin's weights are made here and not by the library, so that they can judge it.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    scales = []
    for module in linear:
        groups = module.weight.detach().float().unflatten(1, (-1, group))
        scale = (groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).to(model.dtype)
        number = (groups / scale.float()).round() + 0.0  # integers know no -0
        module.weight.data = (number * scale.float()).flatten(1).to(model.dtype)
        scales.append(scale.squeeze(-1))
    model.save_pretrained(twin)
    tokenizer.save_pretrained(twin)
    arguments = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group
    )
    config = QuantizationConfig(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=arguments)},
        ignore=["lm_head"],
        format="pack-quantized",
    )
    apply_quantization_config(model, config)
    for module, scale in zip(linear, scales, strict=True):
        assert isinstance(module.weight_scale, torch.Tensor)
        module.weight_scale.data = scale
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
