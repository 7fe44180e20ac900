"""What monitoring costs, and what batching gains: tokens/s of the transformers engine.

    python benchmarks/overhead.py [demo | FOLDER | HUB-ID] [--probe PATH] [--rounds N] [--tokens N]

Three contestants take turns, so that a change of the machine's load hits them alike: the engine
without a probe, the engine with one that reads every token, and the library's own padded
`generate`. All write the same number of greedy tokens for the same prompts. Reported are medians
over the rounds, and ratios as medians of each round's ratio, with their quartiles: where these lie
on both sides of 0 the difference is noise. The same per CPU second of the process, which other
work on the machine disturbs less. The last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from transformers import AutoModelForCausalLM, PreTrainedModel

from probes.card import ModelIdentity
from probes.cett import column_norms
from probes.neurons import find_ffns
from probes.probe import Probe
from probes.random_probe import random_probe
from server.demo_model import ensure_demo_model
from server.engines.base import GenerationRequest, Sampling
from server.engines.loader import load_transformers_engine
from server.engines.transformers import TransformersEngine

BATCHES = (1, 16)
NEURONS = 100


def synthetic_probe(model: PreTrainedModel, identity: ModelIdentity) -> Probe:
    """100 random neurons over all layers: reads as much as a fitted probe does."""
    ffns = find_ffns(model)
    norms = torch.stack([column_norms(f.weight.detach(), transposed=f.transposed) for f in ffns])
    return random_probe(identity, norms, name="benchmark", neurons=NEURONS, heads=["token"])


def make_prompts(batch: int, vocab_size: int) -> list[list[int]]:
    """Prompts of 24 to 39 tokens, different ones for every row."""
    generator = torch.Generator().manual_seed(batch)
    return [
        torch.randint(3, vocab_size, (24 + row % 16,), generator=generator).tolist()
        for row in range(batch)
    ]


class Spent(NamedTuple):
    """What a run took, in seconds."""

    wall: float
    cpu: float


def timed(run: Callable[[int], None], tokens: int) -> Spent:
    """Of one run; CPU seconds are those of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    run(tokens)
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def run_engine(engine: TransformersEngine, prompts: list[list[int]], tokens: int) -> None:
    """All streams at once, until the last has ended."""
    probe = engine.probes[0].card.name if engine.probes else None

    async def stream(number: int, prompt: list[int]) -> None:
        request = GenerationRequest(
            request_id=str(number),
            prompt_token_ids=tuple(prompt),
            max_tokens=tokens,
            sampling=Sampling(temperature=0.0, ignore_eos=True),
            probe=probe,
        )
        async for _ in engine.generate(request):
            pass

    async def streams() -> None:
        await asyncio.gather(*(stream(*entry) for entry in enumerate(prompts)))

    asyncio.run(streams())


def run_generate(model: PreTrainedModel, prompts: list[list[int]], tokens: int) -> None:
    """One padded `generate` of the library."""
    columns = max(map(len, prompts))
    ids = torch.tensor([[0] * (columns - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (columns - len(p)) + [1] * len(p) for p in prompts])
    model.generate(  # type: ignore[operator]
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
    )


def main(
    model: Annotated[str, typer.Argument(help="`demo`, a model folder, or a hub id")] = "demo",
    probe: Annotated[
        Path | None, typer.Option(help="a fitted probe instead of 100 neurons")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2)] = 15,
    tokens: Annotated[int, typer.Option(min=2)] = 32,
) -> None:
    """Measure and print."""
    path = ensure_demo_model() if model == "demo" else model
    off = load_transformers_engine(path, model_id=model)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map=off.device)
    chosen = Probe.load(probe) if probe else synthetic_probe(plain, off.card.identity)
    on = load_transformers_engine(path, model_id=model, probes=[chosen])

    spent: dict[tuple[int, str], list[Spent]] = {}
    for batch in BATCHES:
        prompts = make_prompts(batch, off.card.vocab_size)
        runs: dict[str, Callable[[int], None]] = {
            "off": partial(run_engine, off, prompts),
            "on": partial(run_engine, on, prompts),
            "generate": partial(run_generate, plain, prompts),
        }
        for run in runs.values():
            run(4)  # warm up
        for turn in range(rounds):
            order = list(runs) if turn % 2 == 0 else list(runs)[::-1]
            for name in order:
                spent.setdefault((batch, name), []).append(timed(runs[name], tokens))
    health = on.health()
    for engine in (off, on):
        asyncio.run(engine.aclose())

    def speed(batch: int, name: str) -> float:
        return statistics.median(batch * tokens / run.wall for run in spent[batch, name])

    def gain(batch: int, below: str, clock: str) -> tuple[float, float, float]:
        """Tokens/s with the probe over those of `below`: quartile, median, quartile of rounds."""
        pairs = zip(spent[batch, "on"], spent[batch, below], strict=True)
        ratios = [getattr(b, clock) / getattr(a, clock) for a, b in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return low, middle, high

    head = ("streams", "off tok/s", "on tok/s", "generate tok/s", "on/off", "on/generate")
    print("".join(f"{title:>16}" for title in head))
    rows = []
    for batch in BATCHES:
        row: dict[str, object] = {"streams": batch}
        row |= {f"{name}_tokens_per_s": speed(batch, name) for name in runs}
        row |= {
            f"on_versus_{below}{'_cpu' if clock == 'cpu' else ''}": gain(batch, below, clock)
            for below in ("off", "generate")
            for clock in Spent._fields
        }
        rows.append(row)
        print(f"{batch:>16}" + "".join(f"{speed(batch, name):>16.1f}" for name in runs), end="")
        for below in ("off", "generate"):
            print(f"{gain(batch, below, 'wall')[1]:>16.3f}", end="")
        print()
        for below in ("off", "generate"):
            for clock in Spent._fields:
                low, middle, high = gain(batch, below, clock)
                print(
                    f"    per {clock} second against {below}: {middle:.3f} [{low:.3f}, {high:.3f}]"
                )
    low, high = (speed(batch, "on") for batch in (BATCHES[0], BATCHES[-1]))
    share = (health.meter_seconds_total or 0.0) / health.forward_seconds_total
    print(f"{BATCHES[-1]} streams write {high / low:.1f} times the tokens of one; the meter's own")
    print(f"clocks say {share:.1%} of the forward passes; load average {os.getloadavg()[0]:.1f}")
    result = {
        "benchmark": "overhead",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": model,
        "probe_neurons": len(chosen.layer),
        "dtype": on.card.dtype,
        "device": str(on.device),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "rounds": rounds,
        "tokens": tokens,
        "meter_share_of_forward": share,
        "gain_of_streams": high / low,
        "results": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
