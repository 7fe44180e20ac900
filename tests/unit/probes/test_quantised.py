"""Only checkpoints whose weights alone are quantised are probed."""

from __future__ import annotations

from typing import Any

import pytest

from probes.errors import ModelError
from probes.quantised import quantisation, refuse_unproven


def packed(**changes: Any) -> dict[str, Any]:
    """As llm-compressor writes it, with four bits a weight."""
    group = {
        "targets": ["Linear"],
        "weights": {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 128},
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group | changes.pop("group", {})},
        "kv_cache_scheme": None,
        "transform_config": {},
        **changes,
    }


def test_weights_of_four_or_eight_bits_are_read() -> None:
    refuse_unproven("m", packed())
    refuse_unproven("m", packed(group={"weights": {"type": "int", "num_bits": 8}}))


@pytest.mark.parametrize(
    ("quantised", "reason"),
    [
        ({"quant_method": "awq"}, r"quantised \(awq\)"),
        ({}, r"quantised \(unknown method\)"),
        (packed(group={"input_activations": {"num_bits": 8}}), "activations are quantised, too"),
        (packed(group={"output_activations": {"num_bits": 8}}), "activations are quantised, too"),
        (packed(kv_cache_scheme={"num_bits": 8}), "keys and values are quantised"),
        (packed(transform_config={"config_groups": {}}), "activations are rotated"),
        (packed(config_groups={}), "names no groups"),
        (packed(group={"weights": {"type": "float", "num_bits": 8}}), "no integers"),
        (packed(group={"weights": {"type": "int", "num_bits": 2}}), "no integers"),
        (packed(group={"weights": None}), "no integers"),
    ],
)
def test_what_is_not_proven_is_refused_with_its_reason(
    quantised: dict[str, Any], reason: str
) -> None:
    """A probe would be calibrated on numbers that are never served."""
    with pytest.raises(ModelError, match=reason) as refused:
        refuse_unproven("m", quantised)
    assert "use the weights in bfloat16" in str(refused.value)


def test_a_multimodal_model_says_it_of_its_text() -> None:
    assert quantisation({"text_config": {"quantization_config": packed()}}) == packed()
    assert quantisation({"compression_config": packed()}) == packed()
    assert quantisation({"model_type": "llama"}) == {}
