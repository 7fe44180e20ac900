"""The probes' own tests, run through the production path before the service is ready.

A probe names its model and carries token ids with the logits they must read. Running them through
`Engine.score` catches a wrong layer, tokenizer or dtype, and a hook that was never called.
"""

from __future__ import annotations

from collections.abc import Sequence

from probes.fingerprint import match
from probes.known_answer import check
from probes.probe import Probe
from server.engines.base import Engine, ScoreRequest


async def check_probes(engine: Engine, probes: Sequence[Probe]) -> None:
    """ProbeMismatchError or KnownAnswerError when one does not belong to this engine.

    All are attached to it.
    """
    for probe in probes:
        match(probe, engine.card.identity)
        answers = range(len(probe.card.known_answers))
        check(probe, [await _logits(engine, probe, i) for i in answers])


async def _logits(engine: Engine, probe: Probe, i: int) -> list[tuple[float, ...]]:
    readings = await engine.score(
        ScoreRequest(
            request_id=f"known-answer-{i}",
            token_ids=probe.card.known_answers[i].token_ids,
            start=0,
            probe=probe.id,
        )
    )
    return [reading.logits for reading in readings]
