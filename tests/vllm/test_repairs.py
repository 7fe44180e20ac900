"""What the workers put right of vLLM."""

import math
from types import SimpleNamespace

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_numbers_are_found_and_masks_are_not(dtype):
    """A grammar's mask is minus infinity: taken for a fault it would end every JSON answer."""
    from server.engines.vllm.repairs import rows_with_nans

    logits = torch.randn(5, 49_152, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1, 7] = math.nan
    logits[2, 3:] = -math.inf
    logits[3, 9], logits[3, 8] = math.inf, math.nan
    found = rows_with_nans(logits)
    assert found.tolist() == [0, 1, 0, 1, 0]
    assert found.dtype == torch.int32


def test_the_temperature_of_each_request_reaches_its_drafts():
    """vLLM 0.32 gives what lay in the memory: greedy answers changed beside sampled ones."""
    from server.engines.vllm.repairs import expand_to_rows

    values, last = torch.tensor([0.9, 0.0, 0.5, 0.7]), torch.tensor([1, 3, 3, 6], dtype=torch.int32)
    expected = [0.9, 1.0, 1.0, 0.7, 0.7, 0.7]
    assert expand_to_rows(values, last, 6, 0.0, 1).tolist() == pytest.approx(expected)
    top_k = torch.tensor([5, 0, 7, 9], dtype=torch.int32)
    assert expand_to_rows(top_k, last, 6).tolist() == [5, 0, 0, 9, 9, 9]
    assert expand_to_rows(top_k, last, 6).dtype == torch.int32


def test_a_broken_row_of_a_draft_ends_its_own_request_and_no_other():
    """vLLM 0.32 counts row i as request i's."""
    from server.engines.vllm.repairs import count_nans_by_request

    runner = SimpleNamespace(
        _sample=lambda logits, metadata: logits,
        input_batch=SimpleNamespace(req_ids=["a", "b", "c"]),
    )
    count_nans_by_request(runner)
    logits = torch.zeros(6, 9)
    logits[4, 3] = torch.nan
    runner._sample(logits, SimpleNamespace(num_draft_tokens=[1, 2, 0]))
    assert runner._get_nans_in_logits(logits) == {"a": 0, "b": 1, "c": 0}
    runner._sample(logits[3:], None)
    assert runner._get_nans_in_logits(logits[3:]) == {"a": 0, "b": 1, "c": 0}
    assert runner._get_nans_in_logits(None) == {}
