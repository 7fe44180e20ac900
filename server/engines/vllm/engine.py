"""`Engine` over vLLM's AsyncLLM: steps out of its engine's outputs and their readings.

One request here is one request there. vLLM makes no text: detokenising and stop strings are above
the seam, as for every engine.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import TokensInput, tokens_input
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

from probes.errors import HNeuronsError
from server.engines.base import (
    EngineCard,
    EngineDeadError,
    EngineOverloadedError,
    GenerationRequest,
    Grammar,
    Health,
    Reading,
    RequestFailedError,
    Sampling,
    ScoreRequest,
    Step,
    probe_index,
)
from server.engines.vllm.parsers import VllmParsers
from server.engines.vllm.plan import MeterPlan, Order, salt
from server.engines.vllm.processes import EngineProcesses
from server.engines.vllm.sampling import (
    finish_reason,
    sampling_params,
    structured_outputs,
    token_logprobs,
)
from server.engines.vllm.tap import Reader, Tap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm.v1.engine.async_llm import AsyncLLM

    from probes.probe import Probe


class VllmEngine:
    """`Engine` over a running AsyncLLM, which it owns."""

    def __init__(
        self,
        llm: AsyncLLM,
        tokenizer: PreTrainedTokenizerBase,
        card: EngineCard,
        *,
        plan: MeterPlan | None,
        parsers: VllmParsers | None,
        max_waiting_requests: int,
        max_waiting_tokens: int,
    ) -> None:
        """`plan` is what the workers read; None exactly when there is no probe."""
        self._llm: AsyncLLM | None = llm  # None once it is closed
        self._tokenizer, self._card, self._plan = tokenizer, card, plan
        self.parsers = parsers
        self._ends = sorted(card.eos_token_ids)
        self._max_num_seqs: int = llm.vllm_config.scheduler_config.max_num_seqs
        self._max_waiting_requests = max_waiting_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._tap = Tap(llm)
        self._processes = EngineProcesses()
        self._numbers = itertools.count()
        self._dead = ""

    @property
    def card(self) -> EngineCard:
        return self._card

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @property
    def probes(self) -> Sequence[Probe]:
        return self._plan.probes if self._plan is not None else ()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Step, None]:
        """See `Engine.generate`."""
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, not {request.max_tokens}")
        self._check(request.prompt_token_ids, more=request.max_tokens)
        order = self._order(request.probe, request.alpha, request.contributors)
        reads_last = request.read_last and order is not None
        params = sampling_params(request.sampling, order, ends=self._ends)
        params.max_tokens = request.max_tokens + (1 if reads_last else 0)
        reader = Reader(self._plan, order, prompt_tokens=len(request.prompt_token_ids))
        prompt = self._prompt(request.prompt_token_ids, order, tenant=request.tenant)
        written = 0
        async with self._submitted(prompt, params, reader):
            while True:
                output = await reader.output()
                for index, token_id in enumerate(output.new_token_ids):
                    reading = reader.readings.popleft() if reader.readings else None
                    if written == request.max_tokens:  # the hidden step: only its reading counts
                        yield Step(None, reading, finish_reason="length")
                        return
                    written += 1
                    is_last = index + 1 == len(output.new_token_ids)
                    end = finish_reason(output.finish_reason) if is_last else None
                    logprobs = token_logprobs(output, index, request.sampling)
                    yield Step(token_id, reading, logprobs, end)
                    if end is not None:
                        return
                if output.finished:  # without a token
                    end = finish_reason(output.finish_reason)
                    raise RequestFailedError("no_finish", f"vLLM ended the request: {end}")

    async def score(self, request: ScoreRequest) -> tuple[Reading, ...]:
        """See `Engine.score`. One prefill; the token that vLLM writes after it is thrown away."""
        self._check(request.token_ids, more=0)
        order = self._order(request.probe, request.alpha, request.contributors)
        assert order is not None
        order = order._replace(whole_prompt=True)
        params = sampling_params(Sampling(temperature=0), order, ends=self._ends)
        params.max_tokens = 1
        params.skip_reading_prefix_cache = True  # cached tokens are not read again
        reader = Reader(self._plan, order, prompt_tokens=len(request.token_ids))
        prompt = self._prompt(request.token_ids, order, tenant=request.tenant)
        async with self._submitted(prompt, params, reader):
            while not (output := await reader.output()).finished:
                pass
        finish_reason(output.finish_reason)
        wanted = range(max(request.start - 1, 0), len(request.token_ids))
        return await asyncio.to_thread(self._readings_of, reader, order, wanted)

    def _readings_of(self, reader: Reader, order: Order, wanted: range) -> tuple[Reading, ...]:
        # A preempted request reads its prompt again: the last reading of a position counts.
        by_position = {reading.position: reading for reading in reader.of_whole_prompt()}
        return tuple(
            by_position.get(position, self._unread(order, position)) for position in wanted
        )

    def check_grammar(self, grammar: Grammar) -> None:
        """See `GuidedEngine.check_grammar`. vLLM's own check, which it repeats at submission."""
        if self._llm is None:
            raise EngineDeadError(self._dead)
        config = self._llm.vllm_config
        params = SamplingParams(structured_outputs=structured_outputs(grammar))
        try:
            params.verify(
                config.model_config, None, config.structured_outputs_config, self._llm.tokenizer
            )
        except VLLMClientError as error:
            raise ValueError(str(error)) from error

    def health(self) -> Health:
        readers, waiting = self._tap.readers, self._waiting()
        self._look_at_processes()
        return Health(
            alive=not self._dead,
            reason=self._dead,
            running=len(readers) - len(waiting),
            waiting=len(waiting),
            waiting_tokens=sum(waiting),
            seconds_since_step=time.monotonic() - self._tap.last_step if readers else 0.0,
            forward_seconds_total=self._tap.seconds_total,
            cached_tokens_total=self._tap.cached_tokens_total,
            cache_usage=self._tap.cache_usage if readers else 0.0,
            preemptions_total=self._tap.totals["preempted"],
            draft_tokens_total=self._tap.totals["drafted"],
            accepted_draft_tokens_total=self._tap.totals["accepted"],
        )

    async def aclose(self) -> None:
        """See `Engine.aclose`."""
        self._die("the engine is closed")
        llm, self._llm = self._llm, None
        if llm is not None:
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # or it reports the end as an accident
            await asyncio.to_thread(self._processes.end, llm)

    def _look_at_processes(self) -> None:
        """A process that is gone or stopped is seen here before vLLM sees it, if ever."""
        if not self._dead and (reason := self._processes.trouble() or self._silence()):
            self._die(reason)

    def _silence(self) -> str:
        """vLLM's task that hands outputs on ends at the first one it cannot read, for good."""
        task = self._llm and self._llm.output_handler
        return "vLLM's output task has ended; its log says why" if task and task.done() else ""

    def _die(self, reason: str) -> None:
        """End every open request with `reason`."""
        if not self._dead:
            self._dead = reason
            if self._llm is not None:
                self._llm.output_processor.propagate_error(VllmDeadError())

    def _prompt(self, token_ids: Sequence[int], order: Order | None, *, tenant: int) -> TokensInput:
        return tokens_input(list(token_ids), cache_salt=salt(self._plan, order, tenant=tenant))

    @asynccontextmanager
    async def _submitted(
        self, prompt: TokensInput, params: SamplingParams, reader: Reader
    ) -> AsyncIterator[None]:
        """vLLM works on the request, and `reader` is told; leaving this early aborts it."""
        self._refuse_overload(reader.prompt_tokens)
        llm = self._llm
        assert llm is not None
        if not self._tap.readers:
            self._tap.last_step = time.monotonic()
        name = f"hn{next(self._numbers)}"
        self._tap.readers[name] = reader
        ending: asyncio.Future[object] | None = None
        try:
            try:
                collector = await llm.add_request(name, prompt, params)
            except Exception as error:
                raise self._failure(error) from error
            ending = asyncio.ensure_future(collector.get())
            ending.add_done_callback(lambda ended: self._note_end(ended, reader))
            yield
        finally:
            del self._tap.readers[name]
            if ending is not None:
                ending.cancel()
            if not reader.is_over and not self._dead:
                with suppress(VllmDeadError):
                    await llm.abort(name)

    def _note_end(self, ended: asyncio.Future[object], reader: Reader) -> None:
        """vLLM's own collector holds the last output, which is here already, or an error."""
        if ended.cancelled():
            return
        error = ended.exception()
        if reader.is_over:
            return
        if isinstance(error, Exception):
            reader.fail(self._failure(error))
        else:
            reader.fail(RequestFailedError("no_finish", "vLLM ended the request by itself"))

    def _failure(self, error: Exception) -> HNeuronsError:
        """What vLLM raised, in our words."""
        if isinstance(error, VllmDeadError):
            self._dead = self._dead or "vLLM's engine died; its log says why"
            failure: HNeuronsError = EngineDeadError(self._dead)
        else:
            reason = str(error) or type(error).__name__
            failure = RequestFailedError("engine_error", f"vLLM failed the request: {reason}")
        failure.__cause__ = error
        return failure

    def _refuse_overload(self, prompt_tokens: int) -> None:
        if self._dead:
            raise EngineDeadError(self._dead)
        waiting = self._waiting()
        free = max(0, self._max_num_seqs - len(self._tap.readers) + len(waiting))
        if len(waiting) >= free + self._max_waiting_requests:
            raise EngineOverloadedError(f"{len(waiting)} requests are waiting already")
        if waiting and sum(waiting) + prompt_tokens > self._max_waiting_tokens:
            raise EngineOverloadedError(f"{sum(waiting)} prompt tokens are waiting already")

    def _waiting(self) -> list[int]:
        """Prompt tokens of each request that has not written a token yet."""
        return [r.prompt_tokens for r in self._tap.readers.values() if not r.has_begun]

    def _check(self, token_ids: Sequence[int], *, more: int) -> None:
        """Bounds that are checked above as well."""
        total = len(token_ids) + more
        if not token_ids or total > self._card.max_model_len:
            raise ValueError(f"{total} tokens do not fit into 1..{self._card.max_model_len}")
        if min(token_ids) < 0 or max(token_ids) >= self._card.identity.vocab_size:
            raise ValueError(f"token ids are outside the vocabulary of {self._card.vocab_size}")

    def _order(self, probe: str | None, alpha: float, contributors: int) -> Order | None:
        if not math.isfinite(alpha) or alpha < 0:
            raise ValueError(f"alpha must be a finite number >= 0, not {alpha}")
        if probe is None:
            if alpha != 1:
                raise ValueError("alpha scales the neurons of a probe: name one")
            return None
        index = probe_index(self.probes, probe)
        assert self._plan is not None
        if alpha != 1 and not self._plan.suppression:
            raise ValueError("this engine was made without suppression: alpha must be 1")
        return Order(index, alpha, contributors, whole_prompt=False)

    def _unread(self, order: Order, position: int) -> Reading:
        assert self._plan is not None
        heads = len(self._plan.probes[order.probe].bias)
        return Reading(position, (math.nan,) * heads)
