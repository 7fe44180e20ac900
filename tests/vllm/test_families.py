"""Other model families on vLLM, each from a tiny random checkpoint (Done-when 3).

Traced by Dynamo like any other, but not compiled by Inductor: seven compilations would take CI a
quarter of an hour. tests/vllm/test_parity.py compiles.
"""

from __future__ import annotations

import asyncio

import pytest
import torch

from server.engines.base import ScoreRequest
from tests.contract.oracle import (
    LIMIT,
    all_tokens,
    families,
    make_requests,
    random_prompts,
    worst_difference,
)

FAMILIES = families(128, head_dim=32)
# gpt_neox and olmo2 run on vLLM's Transformers backend.
NAMES = ["qwen3", "gemma3", "phi3", "gpt2", "opt", "gpt_neox", "olmo2"]


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")


@pytest.mark.parametrize("name", NAMES)
async def test_readings_equal_the_formula(start_engine, make_model, name):
    """Biases, Conv1D, norms after the FFN, flattened rows, another backend: the same readings."""
    folder, reference, probes = make_model(FAMILIES[name], "float32")
    engine = start_engine(folder, probes, vllm_args="--max-num-batched-tokens 64")
    requests = make_requests(random_prompts(), 5)

    async def generate(request):
        return [step async for step in engine.generate(request)]

    async def score(request, steps):
        readings = await engine.score(
            ScoreRequest(
                request_id="s",
                token_ids=all_tokens(request, steps),
                start=0,
                probe=request.probe,
                alpha=request.alpha,
            )
        )
        return torch.tensor([reading.logits for reading in readings], dtype=torch.float64)

    try:
        served = await asyncio.gather(*map(generate, requests))
        scored = await asyncio.gather(*map(score, requests, served))
    finally:
        await engine.aclose()
    worst = worst_difference(reference, probes, requests, served, scored)
    assert worst <= LIMIT["float32"]
