"""Alpha is exact at 0 and 1, per row, and touches only what it should."""

from __future__ import annotations

import pytest
import torch

from probes.suppression import scales, suppress

MASKS = torch.tensor([[True, False, True], [False, False, True], [True, True, True]])


def test_scales_are_exact_at_zero_and_one():
    """`0.9999999` at alpha 1 would change tokens of requests that asked for nothing."""
    found = scales([0.0, 1.0, 0.3], MASKS)
    assert found.tolist()[:2] == [[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    torch.testing.assert_close(found[2], torch.full((3,), 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flat", [False, True])
def test_only_the_columns_of_the_row_change(dtype, flat):
    z = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    columns = torch.tensor([1, 3, 5])
    given = z.reshape(12, 6) if flat else z
    before = given.clone()
    found = suppress(given, columns, scales([0.0, 1.0, 2.0], MASKS)).reshape(3, 4, 6)
    assert torch.equal(given, before)
    assert found.dtype == dtype
    assert torch.equal(found[..., [0, 2, 4]], z[..., [0, 2, 4]])
    assert torch.equal(found[1], z[1])
    assert not found[0][:, [1, 5]].any()
    assert torch.equal(found[0][:, 3], z[0][:, 3])
    assert torch.equal(found[2][:, [1, 3, 5]], 2 * z[2][:, [1, 3, 5]])


def test_non_finite_values_stay_non_finite():
    """Cleaning them up would hide a broken model behind a plausible risk."""
    z = torch.tensor([[[float("nan"), float("inf"), 1.0]]])
    found = suppress(z, torch.tensor([0, 1]), scales([0.0], torch.ones(1, 2, dtype=torch.bool)))
    assert found.isfinite().tolist() == [[[False, False, True]]]
