"""One request on its way through the transformers engine; knows no pass and no cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from server.engines.base import (
    GenerationRequest,
    Reading,
    RequestFailedError,
    ScoreRequest,
    Step,
)
from server.engines.forward import Tap
from server.engines.prefixes import Salt
from server.engines.sampling import RowSampler

Outcome: TypeAlias = Step | tuple[Reading, ...] | RequestFailedError


class Row:
    """One request on its way through the engine."""

    def __init__(self, request: GenerationRequest | ScoreRequest, tap: Tap) -> None:
        self.request = request
        self.tap = tap
        self.aborted = False  # set by whoever waits for the outcomes; dropped at the next step
        self.written: list[int] = []
        self.readings: list[Reading] = []  # of a ScoreRequest
        self.sampler: RowSampler | None = None
        if isinstance(request, GenerationRequest):
            self.sampler = RowSampler(request.sampling, request.prompt_token_ids)

    @property
    def prompt(self) -> tuple[int, ...]:
        request = self.request
        return request.token_ids if isinstance(request, ScoreRequest) else request.prompt_token_ids

    @property
    def salt(self) -> Salt:
        """Who may share this row's keys and values (I4)."""
        return (self.request.tenant, *self.tap.suppression)

    @property
    def unread(self) -> int:
        """How many tokens the prompt begins with of which no reading is wanted.

        Two tokens at least are left to read: a pass of one takes another way through attention,
        which moves bfloat16 further than sharing does anyway.
        """
        most = len(self.prompt) - 2
        if isinstance(self.request, ScoreRequest):
            return min(most, self.request.start - 1)
        return most

    @property
    def first_wanted(self) -> int:
        """The first position whose reading a ScoreRequest wants."""
        assert isinstance(self.request, ScoreRequest)
        return max(self.request.start - 1, 0)

    def score(self, found: Iterable[Reading]) -> None:
        """Keep the readings of a pass, which are of positions that a ScoreRequest wants."""
        assert isinstance(self.request, ScoreRequest)
        self.readings += found
