"""Windows and spans over token logits. Logits are pooled, risks never."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec


class Pooling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the logits of a response's tokens become one logit.

    max_window  largest mean over `window` neighbouring scored tokens (fewer when there are fewer)
    max         largest single token
    first, last that token
    mean        of all tokens; measures length on long answers (science: 3.7 to 16 times the truth
                effect), so of responses for comparison only; of spans it may be the rule
    """

    kind: Literal["max_window", "max", "first", "last", "mean"]
    window: int = 1

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1, not {self.window}")

    def pool(self, logits: Sequence[float]) -> float:
        """One logit from at least one finite token logit."""
        if not logits:
            raise ValueError("pooling needs at least one logit: an unscored response has no score")
        match self.kind:
            case "first":
                return logits[0]
            case "last":
                return logits[-1]
            case "mean":
                return math.fsum(logits) / len(logits)
            case "max":
                return max(logits)
            case "max_window":
                width = min(self.window, len(logits))
                return max(
                    math.fsum(logits[i : i + width]) / width for i in range(len(logits) - width + 1)
                )


def flagged_runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Half-open `[start, stop)` runs of flagged neighbours."""
    runs: list[tuple[int, int]] = []
    start: int | None = None
    for i, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            runs.append((start, i))
            start = None
    return runs
