"""What the worker does to vLLM besides metering."""

import math
from types import SimpleNamespace
from typing import ClassVar

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


def test_a_step_that_puts_nothing_out_is_a_sign_of_life():
    """A long prompt is read in chunks for a minute and more; the server took that for a hang."""
    from server.engines.vllm.worker import _HandsOn

    class Scheduler:
        requests: ClassVar[dict[str, object]] = {}

        def update_from_output(self, *_: object) -> dict[int, object]:
            return {}

    class HandsOn(_HandsOn, Scheduler):
        pass

    by_client = HandsOn().update_from_output(None, SimpleNamespace())
    assert [outputs.outputs for outputs in by_client.values()] == [[]]
