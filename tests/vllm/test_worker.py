"""What the worker does to vLLM besides metering."""

import math

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_numbers_are_found_and_masks_are_not(dtype):
    """A grammar's mask is minus infinity: taken for a fault it would end every JSON answer."""
    from server.engines.vllm.worker import rows_with_nans

    logits = torch.randn(5, 49_152, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1, 7] = math.nan
    logits[2, 3:] = -math.inf
    logits[3, 9], logits[3, 8] = math.inf, math.nan
    found = rows_with_nans(logits)
    assert found.tolist() == [0, 1, 0, 1, 0]
    assert found.dtype == torch.int32
