"""The probes' own tests, run through the production path before the service is ready.

A probe names its model and carries token ids with the logits they must read. Running them through
`Engine.score` catches a wrong layer, tokenizer or dtype, and a hook that was never called. Answers
are not scored but decoded: other kernels, other graphs, rows of one token, neurons that are scaled.
Those have no recorded logits, but a text must read alike however it came to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from probes.errors import KnownAnswerError
from probes.fingerprint import match
from probes.known_answer import LIMITS, check
from probes.probe import Probe
from server.engines.base import Engine, GenerationRequest, Reading, Sampling, ScoreRequest

DECODED = 8  # tokens
SUPPRESSED = 0.5  # alpha


async def check_probes(engine: Engine, probes: Sequence[Probe], *, suppression: bool) -> None:
    """ProbeMismatchError or KnownAnswerError when one does not belong to this engine.

    All are attached to it. suppression: requests may set alpha
    """
    for probe in probes:
        match(probe, engine.card.identity)
        longest = max((len(one.token_ids) for one in probe.card.known_answers), default=0)
        if longest > engine.card.max_model_len:
            raise KnownAnswerError(
                f"probe {probe.id!r} proves itself on texts of up to {longest} tokens, and "
                f"{engine.card.max_model_len} fit here; raise --max-model-len"
            )
        answers = range(len(probe.card.known_answers))
        check(probe, [await _logits(engine, probe, i) for i in answers])
        for alpha in (1.0, SUPPRESSED) if suppression else (1.0,):
            await _check_decoding(engine, probe, alpha)


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


async def _check_decoding(engine: Engine, probe: Probe, alpha: float) -> None:
    """KnownAnswerError unless what was read while writing is what a reading of the text gives."""
    if not probe.card.known_answers:
        return
    room = engine.card.max_model_len - DECODED
    prompt = probe.card.known_answers[0].token_ids[:room]
    request = GenerationRequest(
        request_id="known-answer-decoded",
        prompt_token_ids=prompt,
        max_tokens=DECODED,
        sampling=Sampling(temperature=0, ignore_eos=True),
        probe=probe.id,
        read_last=True,
        alpha=alpha,
    )
    steps = [step async for step in engine.generate(request)]
    written = tuple(step.token_id for step in steps if step.token_id is not None)
    start = len(prompt)
    given = await engine.score(
        ScoreRequest(
            request_id="known-answer-given",
            token_ids=prompt + written,
            start=start,
            probe=probe.id,
            alpha=alpha,
        )
    )
    _compare(probe, [step.reading for step in steps], given, alpha)


def _compare(
    probe: Probe, decoded: Sequence[Reading | None], given: Sequence[Reading], alpha: float
) -> None:
    # Both sides compute, neither is recorded. Measured on the demo model in bfloat16, 800 positions
    # at alpha 1 and .5: .0145 at the worst on transformers, .0066 on vLLM.
    limit = 2 * LIMITS[probe.card.model.dtype]
    for found, wanted in zip_longest(decoded, given):
        if wanted is None:
            raise KnownAnswerError(
                f"probe {probe.id!r}: {len(decoded)} readings while writing, {len(given)} of the "
                f"text (alpha {alpha:g}); this engine reads tokens twice"
            )
        if found is None or found.position != wanted.position:
            raise KnownAnswerError(
                f"probe {probe.id!r}: while writing, position {wanted.position} was not read where "
                f"it should have been (alpha {alpha:g}); this engine loses or misplaces readings"
            )
        for value, expected in zip(found.logits, wanted.logits, strict=True):
            if not abs(value - expected) <= limit:  # nan is no agreement
                raise KnownAnswerError(
                    f"probe {probe.id!r}: position {found.position} reads {value:.6g} while it is "
                    f"written and {expected:.6g} when it is given (alpha {alpha:g}, limit "
                    f"{limit:g}); decoding computes otherwise than reading"
                )
