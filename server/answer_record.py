"""What is told about one answer when it is over, to the audit log and to traces.

Made once per request, whatever became of it: complete, failed or abandoned by its client.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from server.monitor import RiskPlan, RiskSummary


@dataclass(frozen=True, kw_only=True)
class ChoiceRecord:
    """One choice; `risk` is None when none was asked for or the choice did not end."""

    finish_reason: str | None
    risk: RiskSummary | None
    text: str  # what went out, if the server keeps text, else ""


@dataclass(frozen=True, kw_only=True)
class AnswerRecord:
    """One request that reached the model."""

    request_id: str
    answer_id: str
    endpoint: str
    model: str
    plan: RiskPlan | None
    choices: Sequence[ChoiceRecord]
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    error: str | None = None  # code of what ended it; `aborted`: nobody waited any more
    traceparent: str | None = None  # W3C context that the request came with
    ended: float = field(default_factory=time.time)  # Unix seconds


class Recorder(Protocol):
    """Takes records on the event loop; must neither block for long nor raise."""

    def record(self, answer: AnswerRecord) -> None: ...

    def close(self) -> None:
        """Write what is still held back."""
        ...
