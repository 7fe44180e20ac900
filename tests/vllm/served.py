"""An engine beside its oracle: what the tests of this folder ask of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import torch

from probes.probe import Probe
from server.engines.base import GenerationRequest, Sampling, ScoreRequest, Step
from tests.contract.oracle import Reference, all_tokens, worst_difference

ALPHAS = (1.0, 1.0, 1.0, 0.0, 0.5, 2.0)
IN_FLIGHT = 32


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

    async def worst(
        self, requests: Sequence[GenerationRequest], *, leaving: Sequence[GenerationRequest] = ()
    ) -> float:
        """Serve all, 32 at a time, then score their texts; the largest |logit - reference|.

        Clients of the requests in `leaving` go after their first token.
        """
        free = asyncio.Semaphore(IN_FLIGHT)

        async def stay(request: GenerationRequest) -> list[Step]:
            async with free:
                return await self.generate(request)

        async def leave(request: GenerationRequest) -> None:
            async with free, aclosing(self.engine.generate(request)) as steps:
                await anext(steps)

        left = [asyncio.create_task(leave(request)) for request in leaving]
        served = await asyncio.gather(*map(stay, requests))
        await asyncio.gather(*left)
        scored = await asyncio.gather(*map(self.score, requests, served))
        return worst_difference(self.reference, self.probes, requests, served, scored)

    async def inside(self, question: str, *arguments: object) -> Any:
        """Ask the worker for what `tests.vllm.inside` has added to it."""
        (answer,) = await self.engine._llm.collective_rpc(question, args=arguments)
        return answer


def mixed_requests(
    count: int, text: Sequence[int], *, lengths: Sequence[int], tokens: int
) -> list[GenerationRequest]:
    """Prompts out of `text`, every third one behind a common prefix; every alpha, n of 1 and 2."""
    draw = random.Random(0)
    requests: list[GenerationRequest] = []
    while len(requests) < count:
        number = len(requests)
        length = draw.choice(lengths)
        start = draw.randrange(len(text) - length)
        prompt = tuple(text[start : start + length])
        if number % 3 == 0:
            prompt = tuple(text[:96]) + prompt[:40]
        request = GenerationRequest(
            request_id=str(number),
            prompt_token_ids=prompt,
            max_tokens=draw.randrange(1, tokens),
            sampling=Sampling(
                temperature=draw.choice((0.0, 0.9)), seed=number, ignore_eos=number % 4 != 0
            ),
            probe=draw.choice(("one", "two")),
            alpha=draw.choice(ALPHAS),
            read_last=number % 5 != 2,
        )
        requests.append(request)
        if draw.random() < 0.5:
            again = replace(request.sampling, seed=number + 1)
            requests.append(replace(request, sampling=again))
    return requests[:count]
