"""The known-answer test: token ids in, logits out, through the path that serves.

Catches what no digest sees: a wrong layer, template, kernel or dtype, hooks that do not run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from probes.card import KnownAnswer
from probes.errors import KnownAnswerError
from probes.probe import Probe

# Largest accepted |logit - expected|. Batching and recomputation cost <= 6e-7 in float32 and
# <= 7.2e-3 in bfloat16 (measured on risks of a tiny model); a missing attention mask costs 0.53.
LIMITS = {"float32": 1e-4, "float64": 1e-4, "bfloat16": 0.03, "float16": 0.03}

Logits = Sequence[Sequence[float]]  # [tokens][heads]


def build(
    sequences: Sequence[Sequence[int]], read: Callable[[tuple[int, ...]], Logits]
) -> tuple[KnownAnswer, ...]:
    """Record what `read` (token ids -> logits of all heads at every token) says now."""
    answers = []
    for sequence in sequences:
        token_ids = tuple(sequence)
        logits = tuple(tuple(float(value) for value in row) for row in read(token_ids))
        answers.append(KnownAnswer(token_ids=token_ids, logits=logits))
    return tuple(answers)


def check(probe: Probe, logits_by_answer: Sequence[Logits]) -> None:
    """KnownAnswerError unless every logit read now is the one that the card records.

    `logits_by_answer[i]` was read for `probe.card.known_answers[i].token_ids`.
    """
    answers = probe.card.known_answers
    limit = LIMITS[probe.card.model.dtype]
    if len(logits_by_answer) != len(answers):
        raise KnownAnswerError(
            f"probe {probe.id!r}: {len(answers)} known answers, {len(logits_by_answer)} were read"
        )
    for number, (answer, found) in enumerate(zip(answers, logits_by_answer, strict=True)):
        shape, wanted = [len(row) for row in found], [len(row) for row in answer.logits]
        if shape != wanted:
            raise KnownAnswerError(
                f"probe {probe.id!r}: known answer {number} has {len(wanted)} tokens of "
                f"{len(probe.card.heads)} logits, {len(shape)} tokens were read, or other heads"
            )
        for token, rows in enumerate(zip(answer.logits, found, strict=True)):
            for expected, value in zip(*rows, strict=True):
                if not math.isfinite(value) or abs(value - expected) > limit:
                    raise KnownAnswerError(
                        f"probe {probe.id!r}: known answer {number}, token {token}: the model "
                        f"reads logit {value:.6g}, the probe recorded {expected:.6g} (limit "
                        f"{limit:g}); the weights match but this engine computes otherwise"
                    )
