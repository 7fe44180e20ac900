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
from tests.contract.oracle import LIMIT, Reference, all_tokens, worst_difference

ALPHAS = (1.0, 1.0, 1.0, 0.0, 0.5, 2.0)
IN_FLIGHT = 32
# Traced by Dynamo as in production, but run by torch: half a minute less than compiling.
TRACED = """--compilation-config '{"mode": 2, "backend": "eager"}'"""


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
        self,
        requests: Sequence[GenerationRequest],
        *,
        leaving: Sequence[GenerationRequest] = (),
        scoring: bool = True,
    ) -> float:
        """Serve all, 32 at a time, and score their texts; the largest |logit - reference|.

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
        scored = await asyncio.gather(*map(self.score, requests, served)) if scoring else None
        return worst_difference(self.reference, self.probes, requests, served, scored)

    async def check_contributions(self) -> None:
        """Largest first, of the probe's own neurons; all of them and the bias make the logit."""
        probe = self.probes[0]
        request = ScoreRequest(
            request_id="s", token_ids=tuple(range(3, 90)), start=60, probe="one", contributors=40
        )
        plain = Sampling(temperature=0, ignore_eos=True)
        other = GenerationRequest(
            request_id="g",
            prompt_token_ids=tuple(range(3, 33)),
            max_tokens=6,
            sampling=plain,
            probe="two",
            contributors=3,
        )
        readings, steps = await asyncio.gather(self.engine.score(request), self.generate(other))
        assert [reading.position for reading in readings] == list(range(59, 87))
        places = set(zip(probe.layer.tolist(), probe.neuron.tolist(), strict=True))
        for reading in readings:
            values = [abs(share.value) for share in reading.contributions]
            assert values == sorted(values, reverse=True)
            assert {(share.layer, share.neuron) for share in reading.contributions} <= places
            total = sum(share.value for share in reading.contributions) + float(probe.bias[0])
            assert abs(total - reading.logits[0]) <= LIMIT["float32"]
        assert all(len(step.reading.contributions) == 3 for step in steps)

    async def inside(self, question: str, *arguments: object) -> Any:
        """Ask each worker for what `tests.vllm.inside` has added to it; the first one's answer."""
        answers = await self.engine._llm.collective_rpc(question, args=arguments)
        return answers[0]


def mixed_requests(
    count: int,
    text: Sequence[int],
    *,
    lengths: Sequence[int],
    tokens: int,
    probes: Sequence[str] = ("one", "two"),
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
            probe=draw.choice(probes),
            alpha=draw.choice(ALPHAS),
            read_last=number % 5 != 2,
        )
        requests.append(request)
        if draw.random() < 0.5:
            again = replace(request.sampling, seed=number + 1)
            requests.append(replace(request, sampling=again))
    return requests[:count]


def requests_that_fill_blocks(count: int, symbols: int) -> list[GenerationRequest]:
    """One per block of 32 tokens, which all need a second one before they end: with `count` blocks
    somebody has to give up. Prompts of so many different `symbols`."""
    return [
        GenerationRequest(
            request_id=str(number),
            prompt_token_ids=tuple(3 + (number * 7 + i) % symbols for i in range(20)),
            max_tokens=60,
            sampling=Sampling(temperature=0, ignore_eos=True),
            probe="one",
            alpha=ALPHAS[number % 6],
            read_last=True,
        )
        for number in range(count)
    ]
