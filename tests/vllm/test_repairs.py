"""What the workers put right of vLLM."""

import json
import math
import subprocess
import sys
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
    """vLLM 0.32 counts row i as request i's, on the host and, scheduling ahead, on the device."""
    from vllm.v1.worker.gpu_model_runner import nans_to_dict

    from server.engines.vllm.repairs import nans_by_request

    runner = SimpleNamespace(_sample=lambda logits, metadata: logits)
    counts = nans_by_request(runner)
    logits = torch.zeros(6, 9)
    logits[2, 3] = torch.nan
    at = {"a": 0, "b": 1, "c": 2}
    runner._sample(logits, SimpleNamespace(num_draft_tokens=[1, 2, 0]))
    assert nans_to_dict(counts(logits).tolist(), at) == {"a": 0, "b": 1, "c": 0}
    runner._sample(logits[:3], None)
    assert nans_to_dict(counts(logits[:3]).tolist(), at) == {"a": 0, "b": 0, "c": 1}


def test_a_draft_that_is_padding_is_never_accepted():
    """vLLM 0.32 for CPUs accepted it by the probability of the neighbour's last token."""
    found = drawn_after_padding()
    assert set(found) == {(3,)}  # what the model says after what was written


def drawn_after_padding() -> list[tuple[int, ...]]:
    """In a process of its own: vLLM's kernels for CPUs are registered for good."""
    program = """
import json, torch
from types import SimpleNamespace
from vllm.platforms import current_platform
current_platform.import_kernels()
current_platform.register_triton_kernel_overrides()
from vllm.v1.sample import rejection_sampler
from server.engines.vllm.repairs import rejecting_padding
sample = rejection_sampler._rejection_random_sample
rejection_sampler._rejection_random_sample = rejecting_padding(sample)
logits = torch.zeros(4, 16)
logits[1, -1] = 20  # of the neighbour's second draft: its last token is nearly certain
logits[2, 3] = logits[3, 4] = 50
found = []
for _ in range(20):
    out = rejection_sampler.rejection_sample(
        torch.tensor([5, 6, -1, -1], dtype=torch.int32), [2, 2], 2,
        torch.tensor([2, 4], dtype=torch.int32), None, logits,
        torch.tensor([[7], [8]], dtype=torch.int32),
        SimpleNamespace(
            all_greedy=False, all_random=True, temperature=torch.ones(2), generators={}
        ),
    )
    found.append([token for token in out[1].tolist() if token >= 0])
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return [tuple(tokens) for tokens in json.loads(done.stdout.splitlines()[-1])]
