"""An engine beside its oracle: what the tests of this folder ask of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from probes.probe import Probe
from server.engines.base import GenerationRequest, ScoreRequest, Step
from tests.contract.oracle import Reference, all_tokens, worst_difference


@dataclass(frozen=True)
class Served:
    """A running engine beside its oracle."""

    engine: Any
    reference: Reference
    probes: list[Probe]

    async def generate(self, request: GenerationRequest) -> list[Step]:
        return [step async for step in self.engine.generate(request)]

    async def score(self, request: GenerationRequest, steps: Sequence[Step]) -> torch.Tensor:
        readings = await self.engine.score(
            ScoreRequest(
                request_id="score",
                token_ids=all_tokens(request, steps),
                start=0,
                probe=request.probe or "",
                alpha=request.alpha,
            )
        )
        return torch.tensor([reading.logits for reading in readings], dtype=torch.float64)

    async def worst(self, requests: Sequence[GenerationRequest]) -> float:
        """Serve all at once, then score their texts; the largest |logit - reference|."""
        served = await asyncio.gather(*map(self.generate, requests))
        scored = await asyncio.gather(*map(self.score, requests, served))
        return worst_difference(self.reference, self.probes, requests, served, scored)
