"""Steps of an engine in, tokens with text and risk out: where a reading meets its token.

A reading comes with a position. For a probe of position `read` it belongs to the token at that
position, which was written one step earlier; for `write` to the token after it. Risk is computed
here and nowhere else: calibration of a pooled logit, never an average of risks. A token without a
finite reading has risk None and a reason; nothing is guessed. Knows nothing of the wire.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import isfinite
from typing import Literal, NamedTuple, TypeAlias

from probes.probe import Probe
from probes.spans import flagged_runs
from server.detokenizer import Detokenizer
from server.engines.base import (
    Contribution,
    FinishReason,
    Reading,
    RequestFailedError,
    Step,
    TokenLogprobs,
)
from server.parsing import Segment
from server.stop_strings import StopStrings

Policy: TypeAlias = Literal["flag", "stop", "withhold", "retry"]
Unscored: TypeAlias = Literal["not_read", "nonfinite"]
Status: TypeAlias = Literal["scored", "partial", "unavailable"]


@dataclass(frozen=True, kw_only=True)
class RiskPlan:
    """How one answer is monitored; made once per request from what the client asked."""

    probe: Probe
    alpha: float
    token_threshold: float
    response_threshold: float
    operating_point: str | None  # None: the request set its own threshold
    contributors: int
    with_tokens: bool
    policy: Policy

    @cached_property
    def heads(self) -> tuple[int, int]:
        """Where a reading holds the logits of the token head and of the response head."""
        card = self.probe.card
        return card.heads.index(card.token.head), card.heads.index(card.response.head)

    @property
    def is_calibrated(self) -> bool:
        """The calibration was fitted without suppression."""
        return self.alpha == 1


class Token(NamedTuple):
    """One written token: the text it carries and the risk of that text.

    start, end      code points of the visible text, half-open; empty when it carries no text
    segment, call   the field of the answer whose text that is, and which tool call; set by
                    `server.segments`
    risk            calibrated, higher is worse; None when not scored (or not asked for)
    logits          (token head, response head) of a scored token
    """

    token_id: int | None  # None: withheld together with its text
    text: str
    start: int
    end: int
    risk: float | None = None
    unscored: Unscored | None = None
    logits: tuple[float, float] | None = None
    contributions: tuple[Contribution, ...] = ()
    logprobs: TokenLogprobs | None = None
    is_flagged: bool = False
    segment: Segment = "content"
    call: int | None = None

    @property
    def is_read(self) -> bool:
        """It has a risk, or a reason why it has none."""
        return self.risk is not None or self.unscored is not None


class Span(NamedTuple):
    """A run of flagged tokens of one field; its risk is made of its token logits by a rule of its
    own: claims are longer runs than false alarms."""

    start: int
    end: int
    text: str
    risk: float
    segment: Segment = "content"
    call: int | None = None


class Attempt(NamedTuple):
    """One generation of an answer under the policy `retry`."""

    alpha: float
    score: float | None
    is_flagged: bool | None


@dataclass(frozen=True, kw_only=True)
class RiskSummary:
    """The risk of a whole answer; `score` and `is_flagged` are None when nothing was scored."""

    plan: RiskPlan
    status: Status
    reason: str | None
    score: float | None
    is_flagged: bool | None
    spans: tuple[Span, ...]
    unscored: dict[str, int]
    attempts: tuple[Attempt, ...] = ()  # only under `retry`; the last one is returned


class Monitor:
    """One choice. `push` every step; each token comes out once, in order, when it is certain.

    Certain means: its text cannot be cut by a stop string any more and, when a probe reads it, its
    reading has come or can no longer come. Tokens without text wait for the next one with text.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        first_position: int,
        stop: Sequence[str] = (),
        plan: RiskPlan | None = None,
    ) -> None:
        self.tokens: list[Token] = []  # those that have come out
        self.finish_reason: FinishReason | None = None
        self._detokenizer = detokenizer
        self._first_position = first_position  # of the first written token
        self._stop = StopStrings(stop)
        self._plan = plan
        self._waits = plan is not None and plan.probe.card.position == "read"
        self._pending: list[Token] = []  # written, not out yet
        self._settled = 0  # of the pending ones: read, or without a chance to be
        self._length = 0  # characters written
        self._is_cut = False  # a stop string was completed

    def push(self, step: Step) -> list[Token]:
        """The tokens that this step makes certain."""
        was_cut = self._is_cut
        is_written = step.token_id is not None and not was_cut
        if is_written:
            self._write(step)
        if step.reading is not None and self._plan is not None:
            self._read(step.reading)
        self._settled = len(self._pending) - (1 if is_written and self._waits else 0)
        if self._is_cut:
            # The completing token may still show text: one more pass reads it.
            is_text_unread = self._settled < len(self._pending) and self._pending[-1].text != ""
            self.finish_reason = None if is_text_unread and not was_cut else "stop"
        else:
            self.finish_reason = step.finish_reason
        return self._release()

    def finish(self) -> list[Token]:
        """The rest, once the engine has ended or is no longer needed."""
        if self.finish_reason is None:
            raise RequestFailedError("no_finish", "the engine ended without a finish reason")
        return self._let_out(len(self._pending))

    def _write(self, step: Step) -> None:
        assert step.token_id is not None
        text = self._detokenizer.push(step.token_id)
        start, self._length = self._length, self._length + len(text)
        token = Token(step.token_id, text, start, self._length, logprobs=step.logprobs)
        self._pending.append(token)
        cut = self._stop.push(text)
        if cut is not None:
            self._is_cut = True
            self._length = cut
            self._pending = [_cut(token, cut) for token in self._pending]

    def _read(self, reading: Reading) -> None:
        """Give the reading to its token; a position that is out or read already is ignored."""
        assert self._plan is not None
        position = reading.position + (0 if self._waits else 1)
        i = position - self._first_position - len(self.tokens)
        if 0 <= i < len(self._pending) and not self._pending[i].is_read:
            self._pending[i] = score(self._plan, self._pending[i], reading)

    def _release(self) -> list[Token]:
        certain = self._length if self._is_cut else self._length - self._stop.held
        count = 0
        for i, token in enumerate(self._pending[: self._settled]):
            if token.end > certain:
                break
            count = i + 1 if token.text else count
        return self._let_out(count)

    def _let_out(self, count: int) -> list[Token]:
        """The first `count` pending tokens; what is unread by now stays unread."""
        tokens, self._pending = self._pending[:count], self._pending[count:]
        self._settled = max(0, self._settled - count)
        if self._plan is not None:
            tokens = [t if t.is_read else t._replace(unscored="not_read") for t in tokens]
        self.tokens += tokens
        return tokens


def score(plan: RiskPlan, token: Token, reading: Reading) -> Token:
    """The token with the risk of its reading, or with the reason why it has none."""
    # Once per token: no keyword arguments, no generators where there is nothing to go through.
    of_token, of_response = plan.heads
    logit, shares = reading.logits[of_token], reading.contributions
    logits = logit, reading.logits[of_response]
    if not (isfinite(logit) and isfinite(logits[1])) or (
        shares and not all(isfinite(share.value) for share in shares)
    ):
        return token._replace(unscored="nonfinite")
    risk = plan.probe.card.token.calibration.risk(logit)
    is_flagged = token.text != "" and risk >= plan.token_threshold
    carried = token.logprobs, is_flagged, token.segment, token.call
    return Token(*token[:4], risk, None, logits, shares, *carried)


def summarise(plan: RiskPlan, tokens: Sequence[Token]) -> RiskSummary:
    """The answer's risk from all its tokens; only tokens with visible text count.

    Reasoning is read, tinted and not counted: it is no answer, and mostly longer than one.
    """
    rule = plan.probe.card.response
    visible = [token for token in tokens if token.text and token.segment != "reasoning"]
    logits = [token.logits[1] for token in visible if token.logits is not None]
    value = rule.calibration.risk(rule.pooling.pool(logits)) if logits else None
    missing = Counter(token.unscored for token in visible if token.unscored is not None)
    reason = missing.most_common(1)[0][0] if missing else None
    return RiskSummary(
        plan=plan,
        status="unavailable" if value is None else "partial" if missing else "scored",
        reason="no_text" if not visible else reason,
        score=value,
        is_flagged=None if value is None else value >= plan.response_threshold,
        spans=tuple(_spans(plan, tokens)),
        unscored=dict(Counter(token.unscored for token in tokens if token.unscored is not None)),
    )


def _spans(plan: RiskPlan, tokens: Sequence[Token]) -> Iterator[Span]:
    rule = plan.probe.card.token.span
    visible = [token for token in tokens if token.text]
    for (segment, call), group in groupby(visible, key=lambda token: (token.segment, token.call)):
        field = list(group)
        for start, stop in flagged_runs([token.is_flagged for token in field]):
            run = field[start:stop]
            logits = [token.logits[0] for token in run if token.logits is not None]
            risk = rule.calibration.risk(rule.pooling.pool(logits))
            text = "".join(token.text for token in run)
            yield Span(run[0].start, run[-1].end, text, risk, segment, call)


def _cut(token: Token, end: int) -> Token:
    """The token without what a stop string cuts off."""
    start = min(token.start, end)
    text = token.text[: max(0, end - token.start)]
    return token._replace(
        text=text, start=start, end=start + len(text), is_flagged=token.is_flagged and text != ""
    )
