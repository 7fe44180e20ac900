"""Served logits are those of the formula (Done-when 3, I7), on the transformers engine.

The reference (tests/contract/oracle.py) teacher-forces prompt and answer one request at a time, on
a plain transformers model with plain hooks. tests/vllm holds the same for vLLM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

from probes.card import ModelIdentity
from probes.probe import Probe
from server.engines.base import GenerationRequest, ScoreRequest, Step
from server.engines.loader import load_transformers_engine
from tests.contract.oracle import (
    LIMIT,
    all_tokens,
    families,
    make_folder,
    make_probe,
    make_requests,
    random_prompts,
    reference_of,
    worst_difference,
)

FAMILIES = families(32, head_dim=16)


async def serve(
    folder: Path, probes: Sequence[Probe], requests: Sequence[GenerationRequest], **options: object
) -> tuple[list[list[Step]], list[Tensor]]:
    """Steps of every request, sent at once, and the scores of prompt and answer given as text."""
    engine = load_transformers_engine(
        folder, model_id="parity", probes=probes, device="cpu", **options
    )

    async def generate(request: GenerationRequest) -> list[Step]:
        return [step async for step in engine.generate(request)]

    async def score(request: GenerationRequest, steps: Sequence[Step]) -> Tensor:
        readings = await engine.score(
            ScoreRequest(
                request_id=request.request_id,
                token_ids=all_tokens(request, steps),
                start=0,
                probe=request.probe or "",
                alpha=request.alpha,
            )
        )
        return torch.tensor([reading.logits for reading in readings], dtype=torch.float64)

    try:
        served = await asyncio.gather(*map(generate, requests))
        scored = await asyncio.gather(*map(score, requests, served))
    finally:
        await engine.aclose()
    return served, scored


async def identity_of(folder: Path, **options: object) -> ModelIdentity:
    engine = load_transformers_engine(folder, model_id="parity", device="cpu", **options)
    await engine.aclose()
    return engine.card.identity


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
async def test_served_logits_equal_the_formula(name, dtype, tmp_path):
    """A wrong layer, column, mask, position, row or order of suppression in any family."""
    family = FAMILIES[name]
    make_folder(family, tmp_path, dtype)
    reference = reference_of(tmp_path, family.down, transposed=family.transposed)
    identity = await identity_of(tmp_path)
    probes = [
        make_probe(identity, reference.norms, name=label, seed=seed)
        for seed, label in enumerate(("one", "two"))
    ]
    requests = make_requests(random_prompts(), 5)
    for batch, some in ((1, requests[:5]), (4, requests[3:11]), (16, requests)):
        served, scored = await serve(tmp_path, probes, some, max_num_seqs=batch)
        worst = worst_difference(reference, probes, some, served, scored)
        assert worst <= LIMIT[dtype], f"batch {batch}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_served_logits_equal_the_formula_on_the_demo_model(
    demo_model_path, repository, dtype
):
    """The same on real weights and English text, whose activations are far from random ones."""
    reference = reference_of(demo_model_path, "model.layers.{}.mlp.down_proj", transposed=False)
    reference.model.to(getattr(torch, dtype))
    identity = await identity_of(demo_model_path, dtype=dtype)
    probes = [
        make_probe(identity, reference.norms, name=label, seed=seed)
        for seed, label in enumerate(("one", "two"))
    ]
    tokenizer = hf.AutoTokenizer.from_pretrained(demo_model_path)
    text = tokenizer((repository / "LICENSE").read_text()).input_ids
    lengths = (1, 24, 300, 9, 33, 14, 60, 20, 5, 40, 11, 28, 17, 8, 22)
    requests = make_requests([text[50 * i :][:n] for i, n in enumerate(lengths)], 4)
    for batch, some in ((1, requests[4:5]), (4, requests[3:7]), (16, requests)):
        served, scored = await serve(demo_model_path, probes, some, max_num_seqs=batch, dtype=dtype)
        worst = worst_difference(reference, probes, some, served, scored)
        assert worst <= LIMIT[dtype], f"batch {batch}"
