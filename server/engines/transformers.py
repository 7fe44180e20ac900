"""The embedded engine: a transformers model on a thread of its own.

The event loop only passes requests in and steps out: a request becomes a `Row` in an inbox, and
after every step one callback per event loop moves what was made into the requests' queues. What the
thread does is said by `scheduler`, `forward`, `cache` and `sampling`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING

import torch

from probes.errors import ProbeError
from probes.probe import Probe
from probes.tap import Meter
from server.engines.base import (
    EngineCard,
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    GenerationRequest,
    Health,
    Reading,
    ScoreRequest,
    Step,
    probe_index,
)
from server.engines.forward import Forward, Tap
from server.engines.probe_change import ProbeChange
from server.engines.row import Row
from server.engines.scheduler import Scheduler
from server.engines.streams import Item, Stream, deliver

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.01  # whether the thread has ended


class TransformersEngine:
    """`Engine` over a transformers model; starts its thread when made, until `aclose`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        card: EngineCard,
        *,
        probes: Sequence[Probe] = (),
        meter: Meter | None = None,
        make_meter: Callable[[Sequence[Probe]], Meter] | None = None,
        max_num_seqs: int = 16,
        max_waiting_requests: int = 64,
        max_waiting_tokens: int = 65_536,
        prefill_tokens: int = 512,
        prefix_tokens: int = 0,
    ) -> None:
        """`meter` is attached to `model` and reads `probes`; None exactly when there are none.

        make_meter  another one, not attached yet; None: the probes stay what they are
        """
        assert (meter is None) == (not probes)
        self._card, self._tokenizer, self._probes = card, tokenizer, tuple(probes)
        self._attached = self._probes  # what the meter reads: these, and those on their way out
        self._make_meter = make_meter
        self._change: ProbeChange | None = None  # wanted, not made yet
        self._max_num_seqs = max_num_seqs
        self._max_waiting_requests = max_waiting_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._meter = meter
        self._forward: Forward = Forward(model, meter, longest=card.max_model_len)
        self._scheduler = Scheduler(
            self._forward,
            eos_token_ids=card.eos_token_ids,
            max_num_seqs=max_num_seqs,
            prefill_tokens=prefill_tokens,
            prefix_tokens=prefix_tokens,
        )
        self._dead = ""  # why the engine cannot go on
        self._closing = False
        self._inbox: list[Row] = []
        self._streams: dict[Row, Stream] = {}
        self._last_step = time.monotonic()
        self._wake = threading.Condition()  # guards the inbox, the streams and the flags above
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def card(self) -> EngineCard:
        return self._card

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._forward.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @property
    def probes(self) -> Sequence[Probe]:
        return self._probes

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Step, None]:
        """See `Engine.generate`. The request is queued when the first step is awaited."""
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, not {request.max_tokens}")
        if request.sampling.grammar is not None:
            raise ValueError("this engine cannot be held to a grammar: it must be None")
        self._check(request.prompt_token_ids, more=request.max_tokens)
        stream = self._submit(request)
        try:
            while True:
                item = await stream.queue.get()
                if isinstance(item, EngineError):
                    raise item
                assert isinstance(item, Step)
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._abort(stream)

    async def score(self, request: ScoreRequest) -> tuple[Reading, ...]:
        """See `Engine.score`. Runs through the same queue and the same passes as prompts do."""
        self._check(request.token_ids, more=0)
        stream = self._submit(request)
        try:
            item = await stream.queue.get()
            if isinstance(item, EngineError):
                raise item
            assert not isinstance(item, Step)
            return item
        finally:
            self._abort(stream)

    async def attach(self, probes: Sequence[Probe]) -> None:
        """See `ReloadingEngine.attach`."""
        known = {probe.id for probe in self._attached}
        await self._read((*self._attached, *(probe for probe in probes if probe.id not in known)))

    def offer(self, probes: Sequence[Probe]) -> None:
        """See `ReloadingEngine.offer`."""
        self._probes = tuple(probes)

    async def detach(self) -> None:
        """See `ReloadingEngine.detach`."""
        await self._read(self._probes)

    async def _read(self, probes: tuple[Probe, ...]) -> None:
        """Give the thread a meter for `probes` and wait until it has changed over."""
        if self._make_meter is None or self._meter is None:
            raise ProbeError("this server was started without a probe and cannot get one later")
        meter = await asyncio.to_thread(self._make_meter, probes)
        change = ProbeChange(probes, meter, asyncio.get_running_loop())
        with self._wake:
            if self._dead or self._closing:
                raise EngineDeadError(self._dead or "the engine is closed")
            self._change = change
            self._wake.notify()
        await change.done

    def health(self) -> Health:
        scheduler = self._scheduler
        with self._wake:
            inbox = list(self._inbox)
        busy = bool(inbox) or not scheduler.idle
        return Health(
            alive=not self._dead,
            reason=self._dead,
            running=scheduler.running,
            waiting=scheduler.waiting + len(inbox),
            waiting_tokens=scheduler.waiting_tokens + sum(len(row.prompt) for row in inbox),
            seconds_since_step=time.monotonic() - self._last_step if busy else 0.0,
            meter_seconds_total=self._forward.meter_seconds_total,
            forward_seconds_total=self._forward.seconds_total,
            cached_tokens_total=scheduler.cached_tokens_total,
        )

    async def aclose(self) -> None:
        """See `Engine.aclose`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        # Not a join in the loop's executor: asyncio waits for its threads before it ends, and a
        # pass that hangs would keep a process alive that is to end.
        while self._thread.is_alive():
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        if self._meter is not None:
            self._meter.close()
            self._meter = None

    def _check(self, token_ids: Sequence[int], *, more: int) -> None:
        """Bounds that are checked above as well; here a violation would end every request."""
        total = len(token_ids) + more
        if not token_ids or total > self._card.max_model_len:
            raise ValueError(f"{total} tokens do not fit into 1..{self._card.max_model_len}")
        vocab_size = self._card.identity.vocab_size
        for token_id in (min(token_ids), max(token_ids)):
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"token id {token_id} is outside the vocabulary of {vocab_size}")

    def _tap(self, probe: str | None, alpha: float) -> Tap:
        if not math.isfinite(alpha) or alpha < 0:
            raise ValueError(f"alpha must be a finite number >= 0, not {alpha}")
        if probe is None:
            if alpha != 1:
                raise ValueError("alpha scales the neurons of a probe: name one")
            return Tap()
        return Tap(probe_index(self._attached, probe), alpha)

    def _submit(self, request: GenerationRequest | ScoreRequest) -> Stream:
        with self._wake:
            row = Row(request, self._tap(request.probe, request.alpha))
            stream = Stream(row)
            if self._dead or self._closing:
                raise EngineDeadError(self._dead or "the engine is closed")
            waiting = self._scheduler.waiting + len(self._inbox)
            free = max(0, self._max_num_seqs - self._scheduler.running)
            tokens = self._scheduler.waiting_tokens + sum(len(r.prompt) for r in self._inbox)
            if waiting >= free + self._max_waiting_requests:
                raise EngineOverloadedError(
                    f"{waiting} requests are waiting, more than "
                    f"--max-waiting-requests {self._max_waiting_requests} allows"
                )
            if waiting and tokens + len(row.prompt) > self._max_waiting_tokens:
                raise EngineOverloadedError(
                    f"{tokens} prompt tokens are waiting, {len(row.prompt)} more are more than "
                    f"--max-waiting-tokens {self._max_waiting_tokens} allows"
                )
            if self._scheduler.idle and not self._inbox:
                self._last_step = time.monotonic()
            self._inbox.append(row)
            self._streams[row] = stream
            self._wake.notify()
        return stream

    def _abort(self, stream: Stream) -> None:
        """Nobody waits for this row any more; the thread drops it before its next pass."""
        stream.row.aborted = True
        with self._wake:
            self._streams.pop(stream.row, None)

    def _run(self) -> None:
        """The thread: step while there is work, sleep while there is none."""
        reason = "the engine is closed"
        try:
            with torch.inference_mode():
                while self._take_in():
                    outcomes = self._scheduler.step()
                    self._last_step = time.monotonic()
                    self._hand_out(outcomes)
        except Exception as error:
            logger.exception("the engine died")
            reason = f"the engine died: {type(error).__name__}: {error}"
        with self._wake:
            self._dead = reason
            self._inbox.clear()
            left = list(self._streams)
            if self._change is not None:
                self._change.fail(EngineDeadError(reason))
        self._hand_out([(row, EngineDeadError(reason)) for row in left])

    def _take_in(self) -> bool:
        """Wait for work; False when the engine is to end."""
        with self._wake:
            while not (self._closing or self._inbox or self._change) and self._scheduler.idle:
                self._wake.wait()
            if self._change is not None:
                self._change_over(self._change)
                self._change = None
            self._scheduler.add(self._inbox)
            self._inbox = []
            return not self._closing

    def _change_over(self, change: ProbeChange) -> None:
        """Between two passes: the new meter takes the old one's place, rows find their probe."""
        assert self._meter is not None
        ids = [probe.id for probe in change.probes]
        old = [probe.id for probe in self._attached]
        # A row that nobody waits for may still be fed once more: its probe stays until next time.
        used = {row.tap.probe for row in self._rows() if row.tap.probe is not None}
        missing = [i for i in used if old[i] not in ids]
        probes, meter = change.probes, change.meter
        if missing:
            assert self._make_meter is not None
            probes = (*probes, *(self._attached[i] for i in missing))
            ids = [probe.id for probe in probes]
            meter = self._make_meter(probes)
        self._meter.close()
        meter.attach()
        meter.seconds_total = self._meter.seconds_total  # a counter never falls
        for row in self._rows():
            if row.tap.probe is not None:
                row.tap = row.tap._replace(probe=ids.index(old[row.tap.probe]))
        self._scheduler.forget_prefixes()
        self._meter = self._forward.meter = meter
        self._attached = probes
        change.succeed()

    def _rows(self) -> list[Row]:
        """All rows that may still be fed."""
        return [*self._inbox, *self._scheduler.rows]

    def _hand_out(self, outcomes: Sequence[tuple[Row, Item]]) -> None:
        """One callback per event loop; there is one loop, save in tests."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Item]]] = {}
        with self._wake:
            for row, outcome in outcomes:
                stream = self._streams.get(row)
                if stream is not None:
                    by_loop.setdefault(stream.loop, []).append((stream, outcome))
        for loop, items in by_loop.items():
            try:
                loop.call_soon_threadsafe(deliver, items)
            except RuntimeError:  # the loop was closed under its requests: nobody waits any more
                for stream, _ in items:
                    self._abort(stream)
