"""One request at vLLM: how it is submitted, how it ends, and what of vLLM's words is ours then.

The engine around it is ours; vLLM's collector, structs and enumerations are real.
"""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from server.engines.base import (
    EngineDeadError,
    GenerationRequest,
    RequestFailedError,
    Sampling,
    ScoreRequest,
)


class Llm:
    """What of AsyncLLM the engine calls; the test plays vLLM's engine process."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4))
        self.output_processor = SimpleNamespace(request_states={})
        self.collectors: dict[str, Any] = {}
        self.aborted: list[str] = []
        self.refusal: Exception | None = None
        self.output_handler = None  # started with the first request
        self._steps: asyncio.Queue[Any] = asyncio.Queue()
        self.engine_core = SimpleNamespace(get_output_async=self._steps.get)

    async def add_request(self, name: str, prompt: Any, params: Any) -> Any:
        from vllm.v1.engine.output_processor import RequestOutputCollector

        if self.refusal is not None:
            raise self.refusal
        self.output_processor.request_states[f"{name}-1f"] = SimpleNamespace(external_req_id=name)
        self.collectors[name] = RequestOutputCollector(params.output_kind, f"{name}-1f")
        return self.collectors[name]

    async def abort(self, name: str) -> None:
        self.aborted.append(name)

    async def put_out(self, *token_ids: int, finish: int | None = None) -> None:
        """One step for the first request, which is open by then."""
        from vllm.v1.engine import EngineCoreOutputs, FinishReason

        while not self.collectors:
            await asyncio.sleep(0)
        reason = None if finish is None else FinishReason(finish)
        output = output_of(*token_ids, finish_reason=reason)
        self._steps.put_nowait(EngineCoreOutputs(outputs=[output]))
        await self.engine_core.get_output_async()


def output_of(*token_ids: int, **fields: Any) -> Any:
    from vllm.v1.engine import EngineCoreOutput

    return EngineCoreOutput(request_id="hn0-1f", new_token_ids=list(token_ids), **fields)


@pytest.fixture
def llm() -> Llm:
    return Llm()


@pytest.fixture
def engine(llm) -> Any:
    from server.engines.vllm.engine import VllmEngine

    card: Any = SimpleNamespace(
        eos_token_ids=frozenset({2}),
        max_model_len=64,
        identity=SimpleNamespace(vocab_size=50),
        vocab_size=50,
    )
    probe = SimpleNamespace(id="p@1", card=SimpleNamespace(name="p"), bias=[0.0, 0.0])
    plan: Any = SimpleNamespace(
        probes=(probe,), heads=2, head_slice=lambda _: slice(0, 2), suppression=True
    )
    tokenizer: Any = None
    limits = {"max_waiting_requests": 4, "max_waiting_tokens": 100}
    return VllmEngine(llm, tokenizer, card, plan=plan, parsers=None, **limits)


def request_of(max_tokens: int = 4) -> GenerationRequest:
    return GenerationRequest(
        request_id="r", prompt_token_ids=[5, 6], max_tokens=max_tokens, sampling=Sampling()
    )


async def all_of(engine: Any) -> list[int | None]:
    return [step.token_id async for step in engine.generate(request_of())]


async def test_an_answer_ends_by_its_last_output_and_is_not_aborted(engine, llm):
    answer = asyncio.ensure_future(all_of(engine))
    await llm.put_out(7)
    await llm.put_out(8, finish=0)
    assert await answer == [7, 8]
    assert llm.aborted == []
    assert engine.health().running == engine.health().waiting == 0


async def test_who_leaves_is_aborted(engine, llm):
    """vLLM would go on writing for nobody."""
    steps = engine.generate(request_of())
    first = asyncio.ensure_future(anext(steps))
    await llm.put_out(7)
    assert (await first).token_id == 7
    await steps.aclose()
    assert llm.aborted == ["hn0"]
    assert engine.health().running == 0


async def test_who_leaves_while_waiting_is_aborted(engine, llm):
    answer = asyncio.ensure_future(all_of(engine))
    while not llm.collectors:
        await asyncio.sleep(0)
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert llm.aborted == ["hn0"]


@pytest.mark.parametrize("is_dead", [False, True])
async def test_an_error_of_vllm_reaches_whoever_waits(engine, llm, is_dead):
    from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

    answer = asyncio.ensure_future(all_of(engine))
    await llm.put_out(7)
    llm.collectors["hn0"].put(VllmDeadError() if is_dead else ValueError("a bug"))
    with pytest.raises(EngineDeadError if is_dead else RequestFailedError) as failed:
        await answer
    assert ("a bug" in str(failed.value)) is not is_dead
    assert llm.aborted == ([] if is_dead else ["hn0"])
    assert engine.health().alive is not is_dead


async def test_an_error_after_the_last_output_does_not_spoil_the_answer(engine, llm):
    """vLLM has written all of it; only its reader is slow."""
    steps = engine.generate(request_of())
    first = asyncio.ensure_future(anext(steps))
    await llm.put_out(7)
    await first
    await llm.put_out(8, finish=0)
    llm.collectors["hn0"].put(ValueError("a bug"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert [step.token_id async for step in steps] == [8]
    assert llm.aborted == []


async def test_what_vllm_refuses_is_an_error_of_the_request(engine, llm):
    llm.refusal = ValueError("no such thing")
    with pytest.raises(RequestFailedError, match="no such thing"):
        await all_of(engine)


async def test_a_request_that_vllm_ends_by_itself_does_not_wait_for_ever(engine, llm):
    from vllm.v1.engine.output_processor import STREAM_FINISHED

    answer = asyncio.ensure_future(all_of(engine))
    await llm.put_out(7)
    llm.collectors["hn0"].put(STREAM_FINISHED)
    with pytest.raises(RequestFailedError, match="by itself"):
        await answer


@pytest.mark.parametrize(("finish", "word"), [(2, "abort"), (3, "error"), (4, "repetition")])
@pytest.mark.parametrize("is_score", [False, True])
async def test_an_end_without_an_answer_is_an_error(engine, llm, finish, word, is_score):
    """Prevents: 200 and "not scored" for a text that vLLM has given up."""
    score = ScoreRequest(request_id="s", token_ids=(5, 6), start=1, probe="p")
    answer = asyncio.ensure_future(engine.score(score) if is_score else all_of(engine))
    await llm.put_out(finish=finish)
    with pytest.raises(RequestFailedError, match=word):
        await answer


def test_log_probabilities_are_as_many_as_the_request_wants_whatever_its_neighbours_do():
    from vllm.v1.outputs import LogprobsLists

    from server.engines.vllm.sampling import token_logprobs

    lists = LogprobsLists(
        np.array([[5, 9, 5, 2], [1, 1, 4, 3]]),  # the sampled one first, then the best
        np.array([[-1.5, -0.5, -1.5, -math.inf], [-0.1, -0.1, -3.0, -4.0]]),
        np.array([2, 1]),
    )
    output = output_of(5, 1, new_logprobs=lists)
    two, none = Sampling(logprobs=2), Sampling(logprobs=0)
    assert token_logprobs(output, 0, two) == (-1.5, ((9, -0.5), (5, -1.5)))
    assert token_logprobs(output, 1, none) == (-0.1, ())
    assert token_logprobs(output, 0, Sampling()) is None
