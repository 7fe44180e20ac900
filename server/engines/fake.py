"""An engine without weights: it repeats the user's text, one byte per token, and plays every fault.

Same seam as the real ones, no randomness, no files, no model. It "hallucinates" digits: a digit
reads a high logit, scaled by alpha, anything else a low one. Words in square brackets inside the
prompt direct it and are not repeated:

    [nan:3]    the reading of the third written token is not a number
    [fail:3]   only this request fails when it should write its third token
    [die:3]    the engine dies there          [hang:3]   the engine stops there
    [slow:20]  every pass takes 20 ms         [loop]     the text is repeated until max_tokens

Knows nothing of the wire.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from probes.probe import Probe
from server.engines.base import (
    Contribution,
    EngineCard,
    EngineDeadError,
    EngineOverloadedError,
    FinishReason,
    GenerationRequest,
    Health,
    Reading,
    RequestFailedError,
    ScoreRequest,
    Step,
    TokenLogprobs,
    probe_index,
)
from server.engines.fake_model import (
    EOS,
    IM_END,
    IM_START,
    VOCAB_SIZE,
    fake_identity,
    fake_logits,
    fake_probe,
    fake_tokenizer,
)

_DIRECTION = re.compile(rb"\[(nan|fail|die|hang|slow|loop)(?::(\d{1,4}))?\]")


class FakeEngine:
    """Deterministic `Engine`; see the module for what the prompt can ask of it."""

    def __init__(
        self,
        *,
        probes: Sequence[Probe] | None = None,
        answer: Sequence[int] | None = None,
        max_model_len: int = 4096,
        max_num_seqs: int = 64,
        max_waiting_requests: int = 64,
        max_waiting_tokens: int = 65_536,
        step_seconds: float = 0.0,
    ) -> None:
        """`answer`: token ids to write for every request, instead of repeating the user's text."""
        self._probes = (fake_probe(),) if probes is None else tuple(probes)
        self._attached = self._probes
        self._answer = answer
        self._max_waiting_requests = max_waiting_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._max_num_seqs = max_num_seqs
        self._step_seconds = step_seconds
        self._tokenizer = fake_tokenizer()
        self._slots = asyncio.Semaphore(max_num_seqs)
        self._running = self._waiting = self._waiting_tokens = 0
        self._last_step = time.monotonic()
        self._meter_seconds = self._forward_seconds = 0.0
        self._dead = asyncio.Event()
        self._reason = ""
        self.card = EngineCard(
            engine="fake",
            model_id="fake",
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=frozenset({EOS, IM_END}),
            dtype="float32",
            identity=fake_identity(),
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self._tokenizer

    @property
    def probes(self) -> Sequence[Probe]:
        return self._probes

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Step, None]:
        """One `Step` per token; see `Engine.generate`."""
        async with self._admitted(request):
            script = _Script.of(request, self._answer)
            tokens = list(request.prompt_token_ids)
            for count in range(1, request.max_tokens + 1):
                await self._forward(script, count, monitored=request.probe is not None)
                token_id = script.token(count)
                reading = self._reading(request, tokens, len(tokens) - 1, script)
                tokens.append(token_id)
                is_end = token_id in self.card.eos_token_ids and not request.sampling.ignore_eos
                finish: FinishReason | None = None
                if is_end:
                    finish = "stop"
                elif count == request.max_tokens and not request.read_last:
                    finish = "length"
                logprobs = _logprobs(token_id, len(tokens), k=request.sampling.logprobs)
                yield Step(token_id, reading, logprobs, finish)
                if is_end:
                    return
            if request.read_last:
                await self._forward(script, request.max_tokens + 1, monitored=True)
                last = self._reading(request, tokens, len(tokens) - 1, script)
                yield Step(None, last, finish_reason="length")

    async def score(self, request: ScoreRequest) -> tuple[Reading, ...]:
        """Readings of the given tokens; see `Engine.score`."""
        await self._forward(_Script(answer=()), -1, monitored=True)
        return tuple(
            self._reading_of(request, request.token_ids[position], position)
            for position in range(max(request.start - 1, 0), len(request.token_ids))
        )

    async def attach(self, probes: Sequence[Probe]) -> None:
        """See `ReloadingEngine.attach`."""
        self._attached = (*self._attached, *probes)

    def offer(self, probes: Sequence[Probe]) -> None:
        """See `ReloadingEngine.offer`."""
        self._probes = tuple(probes)

    async def detach(self) -> None:
        """See `ReloadingEngine.detach`."""
        self._attached = self._probes

    def health(self) -> Health:
        busy = self._running > 0
        return Health(
            alive=not self._dead.is_set(),
            reason=self._reason,
            running=self._running,
            waiting=self._waiting,
            waiting_tokens=self._waiting_tokens,
            seconds_since_step=time.monotonic() - self._last_step if busy else 0.0,
            meter_seconds_total=self._meter_seconds,
            forward_seconds_total=self._forward_seconds,
            cache_usage=self._running / self._max_num_seqs,
            preemptions_total=0,
            draft_tokens_total=0,
            accepted_draft_tokens_total=0,
        )

    async def aclose(self) -> None:
        self.die("the engine was closed")

    def die(self, reason: str) -> None:
        """Every open and every later request ends with EngineDeadError."""
        self._reason = self._reason or reason
        self._dead.set()

    @asynccontextmanager
    async def _admitted(self, request: GenerationRequest) -> AsyncIterator[None]:
        """Wait for one of `max_num_seqs` slots; refuse at once when the queue is full."""
        if self._dead.is_set():
            raise EngineDeadError(self._reason)
        size = len(request.prompt_token_ids)
        is_full = (
            self._waiting >= self._max_waiting_requests
            or self._waiting_tokens + size > self._max_waiting_tokens
        )
        if self._slots.locked() and is_full:
            raise EngineOverloadedError(
                f"{self._waiting} requests with {self._waiting_tokens} prompt tokens are waiting; "
                f"the limits are {self._max_waiting_requests} and {self._max_waiting_tokens}"
            )
        self._waiting += 1
        self._waiting_tokens += size
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
            self._waiting_tokens -= size
        if self._running == 0:
            self._last_step = time.monotonic()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._slots.release()

    async def _forward(self, script: _Script, count: int, *, monitored: bool) -> None:
        """One pass, the one that writes the `count`-th token; plays the faults."""
        if count == script.die:
            self.die("the prompt asked for it")
        elif count == script.hang:
            await self._dead.wait()
        elif count == script.fail:
            raise RequestFailedError("nonfinite_logits", "the model's logits are not finite")
        seconds = self._step_seconds + script.slow / 1000
        if seconds > 0 and not self._dead.is_set():
            try:
                async with asyncio.timeout(seconds):
                    await self._dead.wait()
            except TimeoutError:
                pass
        else:
            await asyncio.sleep(0)
        if self._dead.is_set():
            raise EngineDeadError(self._reason)
        self._last_step = time.monotonic()
        self._forward_seconds += max(seconds, 1e-6)
        self._meter_seconds += 1e-8 if monitored else 0.0

    def _reading(
        self, request: GenerationRequest, tokens: Sequence[int], position: int, script: _Script
    ) -> Reading | None:
        if request.probe is None:
            return None
        reading = self._reading_of(request, tokens[position], position)
        if script.nan and position == len(request.prompt_token_ids) + script.nan - 1:
            return reading._replace(logits=(math.nan,) * len(reading.logits))
        return reading

    def _reading_of(
        self, request: GenerationRequest | ScoreRequest, token_id: int, position: int
    ) -> Reading:
        assert request.probe is not None
        probe = self._attached[probe_index(self._attached, request.probe)]
        logits = fake_logits(token_id, position, alpha=request.alpha, heads=len(probe.card.heads))
        neurons = zip(probe.layer.tolist(), probe.neuron.tolist(), strict=True)
        shares = tuple(
            Contribution(layer, neuron, logits[0] / 2 ** (rank + 1))
            for rank, (layer, neuron) in enumerate(neurons)
        )
        return Reading(position, logits, shares[: request.contributors])


@dataclass(frozen=True, kw_only=True)
class _Script:
    """What one request's prompt asks the engine to play; counts are 1-based, 0 is never."""

    answer: tuple[int, ...]
    loop: bool = False
    nan: int = 0
    fail: int = 0
    die: int = 0
    hang: int = 0
    slow: int = 0  # milliseconds per pass

    @classmethod
    def of(cls, request: GenerationRequest, answer: Sequence[int] | None) -> _Script:
        text = _last_message(request.prompt_token_ids)
        directions = {name.decode(): int(n or 1) for name, n in _DIRECTION.findall(text)}
        loop = bool(directions.pop("loop", 0)) or request.sampling.ignore_eos
        if answer is None:
            answer = _vary(_DIRECTION.sub(b"", text), request)
        return cls(answer=tuple(answer), loop=loop, **directions)

    def token(self, count: int) -> int:
        """The `count`-th token of the answer, then the end of the turn."""
        if self.loop and self.answer:
            return self.answer[(count - 1) % len(self.answer)]
        return self.answer[count - 1] if count <= len(self.answer) else IM_END


def _last_message(prompt: Sequence[int]) -> bytes:
    """The text of the last closed turn of a chat prompt, or all of a plain prompt."""
    ids = list(prompt)
    if IM_END in ids:
        end = len(ids) - 1 - ids[::-1].index(IM_END)
        start = end - 1 - ids[:end][::-1].index(IM_START) if IM_START in ids[:end] else -1
        ids = ids[start + 1 : end]
        return bytes(i for i in ids if i < 256).partition(b"\n")[2]
    return bytes(i for i in ids if i < 256)


def _vary(text: bytes, request: GenerationRequest) -> bytes:
    """Another choice begins at another word: what a seed does here."""
    if request.sampling.seed is None or request.sampling.temperature == 0:
        return text
    words = text.split(b" ")
    first = random.Random(request.sampling.seed).randrange(len(words))
    return b" ".join(words[first:] + words[:first])


def _logprobs(token_id: int, position: int, *, k: int | None) -> TokenLogprobs | None:
    if k is None:
        return None
    best = -0.01 - (token_id * 7 + position * 3) % 50 / 100
    ranked = (((token_id + rank) % VOCAB_SIZE, best - 1.5 * rank) for rank in range(k))
    return TokenLogprobs(best, tuple(ranked))
