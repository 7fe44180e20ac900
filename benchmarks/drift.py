"""What the drift index of a probe gives for known changes of the traffic.

    python benchmarks/drift.py MODEL PROBE ANSWERS

ANSWERS is the answers.jsonl of a training run. Given answers are read, none is generated: short
factual ones and as many tokens of ordinary long ones, the mixture that the card's reference is of.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from probes.errors import ProbeMismatchError
from probes.probe import Probe
from server.engines.base import Engine, ScoreRequest
from server.engines.loader import load_transformers_engine

ANSWERS = 100  # short ones per condition
LONG_TOKENS = 120  # of each ordinary answer
Answer = dict[str, Any]


def index(probe: Probe, risks: Sequence[float]) -> float:
    """The population-stability index, as deploy/prometheus/recording.rules.yml computes it."""
    reference = probe.card.token.reference
    assert reference is not None, "this card has no reference: publish the probe again"
    counts = Counter(map(reference.bin, risks))
    shares = [max(counts[i] / len(risks), 1e-4) for i in range(len(reference.shares))]
    return math.fsum(
        (p - q) * math.log(p / q) for p, q in zip(shares, reference.shares, strict=True)
    )


async def risks_of(
    engine: Engine, probe: Probe, answers: Iterable[Answer], *, most: int = 10**6
) -> list[float]:
    """Risks of the tokens with text, at most `most` of each answer."""

    async def one(number: int, answer: Answer) -> list[float]:
        written = answer["token_ids"][: -1 if answer["finish_reason"] == "stop" else None][:most]
        prompt = answer["prompt_token_ids"]
        readings = await engine.score(
            ScoreRequest(
                request_id=str(number),
                token_ids=(*prompt, *written),
                start=len(prompt) + 1,
                probe=probe.id,
            )
        )
        return [probe.card.token.calibration.risk(reading.logits[0]) for reading in readings]

    found = await asyncio.gather(*(one(i, answer) for i, answer in enumerate(answers)))
    return [risk for risks in found for risk in risks]


def without_system_turn(engine: Engine, answer: Answer) -> Answer:
    """The same question in a template that has lost its system turn."""
    text = engine.tokenizer.decode(answer["prompt_token_ids"])
    assert isinstance(text, str)
    rest = text[text.index("<|im_start|>user") :]
    ids = engine.tokenizer(rest, add_special_tokens=False).input_ids
    return answer | {"prompt_token_ids": ids}


async def main(model: str, probe_path: Path, path: Path) -> None:
    probe = Probe.load(probe_path)
    lines = path.read_text().splitlines()[1:]
    by_source: dict[str, list[Answer]] = {}
    for answer in map(json.loads, lines):
        key = answer["style"] if answer["style"] == "ordinary" else answer["source"]
        by_source.setdefault(key, []).append(answer)
    rng = random.Random(0)
    for answers in by_source.values():
        rng.shuffle(answers)
    trained = ("wikidata_completions", "triviaqa_train")
    weights = [len(by_source[source]) for source in trained]
    shares = [round(ANSWERS * weight / sum(weights)) for weight in weights]
    short = [a for s, n in zip(trained, shares, strict=True) for a in by_source[s][:n]]
    engine = load_transformers_engine(
        model, model_id=model, probes=(probe,), max_waiting_requests=1000
    )
    try:
        prose = await risks_of(engine, probe, by_source["ordinary"][:20], most=LONG_TOKENS)
        rng.shuffle(prose)
        mixtures = {"the same questions": short}
        mixtures["template without its system turn"] = [
            without_system_turn(engine, a) for a in short
        ]
        for source in sorted(set(by_source) - {*trained, "ordinary"}):
            mixtures[f"another domain: {source}"] = by_source[source][:ANSWERS]
        print("| traffic | answers | tokens | index |\n|---|---|---|---|")
        for name, answers in mixtures.items():
            risks = await risks_of(engine, probe, answers)
            both = risks + (prose * 9)[: len(risks)]
            print(
                f"| {name} | {len(answers)} | {len(both)} | {index(probe, both):.3f} |", flush=True
            )
        print(
            f"| ordinary prose alone | 20 | {len(prose)} | {index(probe, prose):.3f} |", flush=True
        )
    finally:
        await engine.aclose()
    try:
        load_transformers_engine(model, model_id=model, probes=(probe,), dtype="float32")
    except ProbeMismatchError as error:
        print(f"| the model in float32 | - | - | refused at start: {error.field} |")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
