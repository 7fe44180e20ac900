"""What collecting gains when the beginnings of prompts are read once.

    python benchmarks/prefixes.py QUESTIONS... [--asked 128] [--samples 1] [--rounds 3]

QUESTIONS as `python -m offline collect` takes them. One engine keeps no prompt, the other 4,096
tokens of them; they take turns at the same questions, 32 at once, greedy, or sampled when there are
several samples. Answers must be the same to the token. Ratios are taken within a round, of wall and
of CPU seconds (OMP_NUM_THREADS=1 keeps these honest on a busy machine: waiting threads spin). The
last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import statistics
import time
from typing import Annotated, Any

import torch
import typer

from offline.questions import Question, Source, read_questions, shuffle_key
from server.demo_model import ensure_demo_model
from server.engines.base import GenerationRequest, Sampling
from server.engines.loader import load_transformers_engine
from server.engines.transformers import TransformersEngine

IN_FLIGHT = 32
KEPT = {"none kept": 0, "kept": 4096}


def make_requests(
    engine: TransformersEngine, questions: list[Question], samples: int
) -> list[GenerationRequest]:
    """Samples of one question stand together, as `collect` asks them."""

    def token_ids(question: Question) -> tuple[int, ...]:
        messages = [{"role": "user", "content": question.prompt}]
        ids: Any = engine.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return tuple(ids)

    return [
        GenerationRequest(
            request_id=f"{question.id}/{sample}",
            prompt_token_ids=token_ids(question),
            max_tokens=question.max_tokens,
            sampling=Sampling(temperature=float(samples > 1), top_p=0.9, top_k=50, seed=sample),
        )
        for question in questions
        for sample in range(samples)
    ]


async def collect(
    engine: TransformersEngine, requests: list[GenerationRequest]
) -> list[list[int | None]]:
    """The tokens of every answer."""
    slots = asyncio.Semaphore(IN_FLIGHT)

    async def one(request: GenerationRequest) -> list[int | None]:
        async with slots:
            return [step.token_id async for step in engine.generate(request)]

    return await asyncio.gather(*map(one, requests))


async def compare(
    model: str, questions: list[Question], samples: int, rounds: int
) -> dict[str, object]:
    engines = {
        name: load_transformers_engine(
            model, model_id="demo", max_num_seqs=IN_FLIGHT, prefix_tokens=tokens
        )
        for name, tokens in KEPT.items()
    }
    requests = make_requests(engines["kept"], questions, samples)
    prompts = sum(len(request.prompt_token_ids) for request in requests)
    wall: dict[str, list[float]] = {name: [] for name in KEPT}
    cpu: dict[str, list[float]] = {name: [] for name in KEPT}
    differing = 0
    cached = 0
    for number in range(rounds + 1):
        found = {}
        for name in sorted(KEPT, reverse=bool(number % 2)):
            before = engines[name].health().cached_tokens_total
            started, spent = time.perf_counter(), time.process_time()
            found[name] = await collect(engines[name], requests if number else requests[:IN_FLIGHT])
            if number:  # round 0 warms up
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - spent)
                cached = engines[name].health().cached_tokens_total - before or cached
        differing += sum(a != b for a, b in zip(*found.values(), strict=True))
    for engine in engines.values():
        await engine.aclose()

    def gain(seconds: dict[str, list[float]]) -> float:
        pairs = zip(seconds["none kept"], seconds["kept"], strict=True)
        return statistics.median(without / with_ for without, with_ in pairs)

    return {
        "benchmark": "prefixes",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "questions": len(questions),
        "samples": samples,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "prompt_tokens": prompts,
        "not_read_again": cached,
        "answers_that_differ": differing,
        "seconds": {name: statistics.median(values) for name, values in wall.items()},
        "cpu_seconds": {name: statistics.median(values) for name, values in cpu.items()},
        "gain": gain(wall),
        "gain_cpu": gain(cpu),
    }


def main(
    questions: Annotated[list[str], typer.Argument(help="PATH:STYLE[:PER_GROUP[:SKIP]]")],
    asked: Annotated[int, typer.Option(min=1)] = 128,
    samples: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Print what both took."""
    rows = [row for text in questions for row in read_questions(Source.parse(text))]
    rows.sort(key=lambda question: shuffle_key(question.id))
    found = asyncio.run(compare(str(ensure_demo_model()), rows[:asked], samples, rounds))
    for name in ("prompt_tokens", "not_read_again", "answers_that_differ", "gain", "gain_cpu"):
        print(f"{name:<20}{found[name]:>10.4g}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
