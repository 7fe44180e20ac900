"""The formula in edge cases; its golden numbers are in tests/contract/test_reference.py."""

from __future__ import annotations

import torch

from probes.cett import cett, column_norms, h_norm


def test_everything_is_float32_whatever_comes_in():
    """Trap 12: the reference computes in the model's dtype."""
    z, h = torch.randn(2, 3, 5).bfloat16(), torch.randn(2, 3, 4).bfloat16()
    norms = column_norms(torch.randn(4, 5).bfloat16())
    assert norms.dtype == h_norm(h).dtype == torch.float32
    assert cett(z, norms, h_norm(h).unsqueeze(-1)).dtype == torch.float32


def test_a_zero_output_gives_a_finite_number():
    values = cett(torch.ones(1, 2), torch.ones(2), torch.zeros(1, 1))
    assert values.isfinite().all()
    assert not cett(torch.zeros(1, 2), torch.ones(2), torch.zeros(1, 1)).any()


def test_a_lone_neuron_is_the_whole_output():
    """By definition its relative contribution is 1."""
    weight = torch.randn(4, 3)
    z = torch.tensor([[0.0, -2.0, 0.0]])
    values = cett(z, column_norms(weight), h_norm(z @ weight.T).unsqueeze(-1))
    torch.testing.assert_close(values, torch.tensor([[0.0, 1.0, 0.0]]))
