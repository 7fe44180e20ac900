"""Recorder and Meter against the formula written out with plain hooks."""

from __future__ import annotations

import pytest
import torch

from probes.neurons import find_ffns
from probes.tap import Meter, Recorder

FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2",
    "gpt2", "gpt_neox", "opt", "falcon", "bloom", "square", "square_gpt2",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_meter_equals_recorder_equals_formula(family, make_model, make_probe, plain_cett, tokens):
    """The train/serve skew: two implementations of one formula drift apart unseen."""
    model = make_model(family)
    ffns = find_ffns(model)
    probes = [make_probe(ffns, seed=1), make_probe(ffns, seed=2, count=5)]
    plain = plain_cett(model, ffns, tokens)
    with torch.no_grad(), Recorder(ffns) as recorder:
        model(tokens)
        recorded = [recorder.cett(layer).reshape(plain[layer].shape) for layer in range(3)]
    with torch.no_grad(), Meter(ffns, probes, suppression=True) as meter:
        meter.begin(batch=3)
        model(tokens)
        logits = meter.logits()
    assert logits.dtype == torch.float32
    assert logits.shape == (3, 7, 4)
    for layer in range(3):
        torch.testing.assert_close(recorded[layer].double(), plain[layer], rtol=1e-5, atol=1e-7)
    for index, probe in enumerate(probes):
        heads = logits[..., meter.head_slice(index)].double()
        for source in (recorded, plain):
            expected = _logits(probe, source)
            torch.testing.assert_close(heads, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_suppression_equals_formula_row_by_row(family, make_model, make_probe, plain_cett, tokens):
    """z is read before suppression and h after it; each row has an alpha of its own."""
    model = make_model(family)
    ffns = find_ffns(model)
    probe = make_probe(ffns)
    masks = [torch.zeros(ffns[0].intermediate_size, dtype=torch.bool) for _ in ffns]
    for layer, neuron in probe.h_neurons:
        masks[layer][neuron] = True
    alphas = torch.tensor([0.0, 0.5, 2.0])
    expected = _logits(probe, plain_cett(model, ffns, tokens, alphas=alphas, masks=masks))
    with torch.no_grad(), Meter(ffns, [probe], suppression=True) as meter:
        meter.begin([(0, alpha) for alpha in alphas.tolist()])
        model(tokens)
        torch.testing.assert_close(meter.logits().double(), expected, rtol=1e-4, atol=1e-5)


def _logits(probe, values):
    """`[batch, tokens, heads]` float64 from dense CETT per layer."""
    picked = torch.stack(
        [values[at][..., j].double() for at, j in zip(probe.layer, probe.neuron, strict=True)], -1
    )
    return picked @ probe.weight.double() + probe.bias.double()
