"""The engine between event loop and thread: queues, limits, aborts, deaths, readings."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from server.engines.base import (
    EngineDeadError,
    EngineOverloadedError,
    RequestFailedError,
    ScoreRequest,
    Step,
)
from server.engines.loader import load_transformers_engine
from server.engines.streams import QUEUE_STEPS

PROMPTS = [[5, 6, 7], [40], [9, 8, 7, 6, 5, 4, 3], [50, 51, 52, 53], [11] * 30]


def tokens(steps: list[Step]) -> list[int | None]:
    return [step.token_id for step in steps]


async def read_all(stream: AsyncIterator[Step], steps: list[Step]) -> None:
    async for step in stream:
        steps.append(step)


async def test_requests_of_every_kind_mix_in_one_batch(make_engine, request_of, collect):
    """I3 and I12: tokens and readings do not depend on the neighbours, nor on the order."""
    engine = make_engine()
    kinds = [
        {"probe": "first", "read_last": True},
        {"temperature": 1.0, "seed": 3, "probe": "second", "alpha": 0.0},
        {"temperature": 0.8, "seed": 4, "top_p": 0.8, "repetition_penalty": 1.3},
        {"probe": "second", "alpha": 2.0, "contributors": 3, "logprobs": 2},
        {"frequency_penalty": 1.0, "probe": "first", "alpha": 0.5},
    ]
    requests = [request_of(prompt, 12, **kind) for prompt, kind in zip(PROMPTS, kinds, strict=True)]
    alone = [await collect(engine, request) for request in requests]
    together = await asyncio.gather(*(collect(engine, request) for request in requests))
    backwards = await asyncio.gather(*(collect(engine, request) for request in requests[::-1]))
    for one, two, three in zip(alone, together, backwards[::-1], strict=True):
        assert tokens(one) == tokens(two) == tokens(three)
        for left, right in zip(one + one, two + three, strict=True):
            assert (left.reading is None) == (right.reading is None)
            if left.reading and right.reading:
                assert left.reading.position == right.reading.position
                assert left.reading.logits == pytest.approx(right.reading.logits, abs=1e-5)


async def test_alpha_of_one_request_leaves_no_trace_in_another(make_engine, request_of, collect):
    """I4: beside, before and after requests with the same prompt under another alpha."""
    engine = make_engine()
    prompt = PROMPTS[4]
    request = request_of(prompt, 10, probe="first", read_last=True)
    expected = await collect(engine, request)
    strange = [request_of(prompt, 10, probe="first", alpha=alpha) for alpha in (0.0, 2.0, 3.0)]
    _, beside, *_ = await asyncio.gather(
        collect(engine, strange[0]),
        collect(engine, request),
        collect(engine, strange[1]),
        collect(engine, strange[2]),
    )
    after = await collect(engine, request)
    for steps in (beside, after):
        assert tokens(steps) == tokens(expected)
        for step, other in zip(steps, expected, strict=True):
            assert step.reading.logits == pytest.approx(other.reading.logits, abs=1e-5)
    changed = await collect(engine, strange[0])
    assert changed[0].reading.logits != pytest.approx(expected[0].reading.logits, abs=1e-3)


async def test_monitoring_does_not_change_a_token(make_engine, request_of, collect):
    """I6: with the probe, without it, and on an engine that has none."""
    bare = make_engine(probes=())
    engine = make_engine()
    for options in ({}, {"temperature": 1.0, "seed": 5}):
        for prompt in PROMPTS:
            off = await collect(engine, request_of(prompt, 12, **options))
            read = await collect(engine, request_of(prompt, 12, probe="first", **options))
            without = await collect(bare, request_of(prompt, 12, **options))
            assert tokens(off) == tokens(read) == tokens(without)
            assert all(step.reading is None for step in off + without)


async def test_readings_stand_at_the_position_of_the_token_that_was_fed(
    make_engine, request_of, collect
):
    """The lag: a reading that is off by one trains and serves different probes."""
    engine = make_engine()
    steps = await collect(engine, request_of([5, 6, 7], 4, probe="first", read_last=True))
    assert [step.reading.position for step in steps] == [2, 3, 4, 5, 6]
    assert [step.finish_reason for step in steps] == [None] * 4 + ["length"]
    written = tokens(steps)[:-1]
    score = ScoreRequest(request_id="s", token_ids=(5, 6, 7, *written), start=3, probe="first")
    for step, reading in zip(steps, await engine.score(score), strict=True):
        assert step.reading.position == reading.position
        assert step.reading.logits == pytest.approx(reading.logits, abs=1e-5)


@pytest.mark.parametrize("start", [0, 1, 40, 700])
async def test_scores_are_returned_for_the_positions_that_were_asked_for(make_engine, start):
    """`max(start - 1, 0)` to the end, in order, in one chunk or in several."""
    engine = make_engine(max_model_len=512)
    for length in (41, 512):
        token_ids = tuple(3 + i % 90 for i in range(length))
        request = ScoreRequest(request_id="s", token_ids=token_ids, start=start, probe="second")
        readings = await engine.score(request)
        assert [r.position for r in readings] == list(range(max(start - 1, 0), length))
        assert all(len(r.logits) == 2 for r in readings)


async def test_contributions_are_the_largest_shares_of_the_logit(make_engine, tiny_probes):
    """They must be those of the same row and token; all of them and the bias make the logit."""
    engine = make_engine()
    probe = tiny_probes[0]
    request = ScoreRequest(
        request_id="s", token_ids=(5, 6, 7, 8), start=2, probe="first", contributors=20
    )
    for reading in await engine.score(request):
        values = [abs(share.value) for share in reading.contributions]
        assert values == sorted(values, reverse=True)
        total = math.fsum(share.value for share in reading.contributions) + float(probe.bias[0])
        assert total == pytest.approx(reading.logits[0], abs=1e-4)


async def test_closing_the_stream_aborts_the_request(make_engine, request_of, eventually):
    """I5: a client that leaves must not keep computing, and leaves nothing behind."""
    engine = make_engine()
    stream = engine.generate(request_of([5, 6], 400, probe="first"))
    async for step in stream:
        assert step.token_id is not None
        break
    await stream.aclose()
    await eventually(lambda: engine.health().running == 0)
    assert not engine._streams
    assert engine._scheduler._cache.rows == 0
    assert engine.health().seconds_since_step == 0


async def test_a_queued_request_is_aborted_too(make_engine, request_of, eventually):
    """Cancelled while it waits: it must never start."""
    engine = make_engine(max_num_seqs=1)
    running = engine.generate(request_of([5], 400))
    await anext(running)
    queued = asyncio.create_task(anext(engine.generate(request_of([6], 5))))
    await eventually(lambda: engine.health().waiting == 1)
    assert engine.health().waiting_tokens == 1
    queued.cancel()
    await eventually(lambda: engine.health().waiting == 0)
    await running.aclose()
    await eventually(lambda: engine.health().running == 0)


async def test_the_queue_is_bounded_in_requests_and_in_tokens(make_engine, request_of, collect):
    """Unbounded waiting is memory; the excess is told at once and nothing was started."""
    engine = make_engine(max_num_seqs=1, max_waiting_requests=2, max_waiting_tokens=50)
    running = engine.generate(request_of([5], 450))
    await anext(running)
    waiting = [asyncio.create_task(collect(engine, request_of([6] * 20, 2))) for _ in range(2)]
    await asyncio.sleep(0.05)
    with pytest.raises(EngineOverloadedError, match="2 requests are waiting"):
        await anext(engine.generate(request_of([7], 1)))
    waiting.pop().cancel()
    await asyncio.sleep(0.05)
    with pytest.raises(EngineOverloadedError, match="20 prompt tokens are waiting"):
        await anext(engine.generate(request_of([7] * 40, 1)))
    await running.aclose()
    assert len(await waiting[0]) == 2


async def test_a_burst_that_the_batch_holds_is_not_overload(make_engine, request_of, collect):
    """Free rows are not a queue: the limit on waiting must not refuse what could run."""
    engine = make_engine(max_num_seqs=8, max_waiting_requests=1)
    done = await asyncio.gather(*(collect(engine, request_of([5, 6], 3)) for _ in range(8)))
    assert [len(steps) for steps in done] == [3] * 8


async def test_a_reader_that_falls_behind_is_given_up(make_engine, request_of, eventually):
    """A queue that grows for a client that does not read is memory without an end."""
    engine = make_engine()
    stream = engine.generate(request_of([5, 6], 500))
    steps = [await anext(stream)]
    await eventually(lambda: engine.health().running == 0)
    with pytest.raises(RequestFailedError, match="read faster") as failure:
        await read_all(stream, steps)
    assert failure.value.code == "slow_client"
    assert len(steps) <= QUEUE_STEPS + 1


async def test_a_dead_engine_ends_every_stream_and_says_so(
    make_engine, request_of, eventually, monkeypatch
):
    """Clients that wait for ever on a dead engine, and a server that calls itself healthy."""
    engine = make_engine(max_num_seqs=1)
    running = engine.generate(request_of([5], 400))
    await anext(running)
    queued = asyncio.create_task(anext(engine.generate(request_of([6], 5))))
    await eventually(lambda: engine.health().waiting == 1)

    def explode(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._scheduler, "step", explode)
    with pytest.raises(EngineDeadError, match="out of memory"):
        await read_all(running, [])
    with pytest.raises(EngineDeadError, match="out of memory"):
        await queued
    assert not engine.health().alive
    assert "out of memory" in engine.health().reason
    with pytest.raises(EngineDeadError, match="out of memory"):
        await anext(engine.generate(request_of([5], 1)))


async def test_closing_ends_streams_with_a_sentence_and_the_thread(make_engine, request_of):
    """A thread that outlives its engine keeps the model in memory."""
    engine = make_engine()
    running = engine.generate(request_of([5], 400))
    await anext(running)
    await engine.aclose()
    with pytest.raises(EngineDeadError, match="closed"):
        await read_all(running, [])
    assert not engine._thread.is_alive()
    with pytest.raises(EngineDeadError, match="closed"):
        await anext(engine.generate(request_of([5], 1)))
    assert not engine.health().alive


async def test_closing_leaves_no_thread_of_the_loop_waiting(make_engine, request_of):
    """asyncio waits for the threads of its executor before it ends: one that joined a pass that
    hangs kept a dead server alive, and its supervisor from starting another."""
    engine = make_engine()
    await anext(engine.generate(request_of([5], 4)))
    hangs, step = threading.Event(), engine._scheduler.step

    def hanging() -> Any:
        hangs.wait()
        return step()

    engine._scheduler.step = hanging
    running = asyncio.ensure_future(anext(engine.generate(request_of([5], 4))))
    await asyncio.sleep(0.05)
    before = threading.active_count()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.aclose(), 0.2)
    assert threading.active_count() == before
    hangs.set()
    await asyncio.wait({running})
    await engine.aclose()
    assert not engine._thread.is_alive()


async def test_contributions_are_computed_where_they_are_wanted(make_engine, monkeypatch):
    """Each one stops every stream for a moment; a long prompt has thousands of tokens."""
    engine = make_engine()
    asked, contributions = [], engine._forward.contributions

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["column"])
        return contributions(*args, **kwargs)

    monkeypatch.setattr(engine._forward, "contributions", counted)
    ids = tuple(3 + i % 90 for i in range(100))
    request = ScoreRequest(request_id="s", token_ids=ids, start=97, probe="first", contributors=2)
    readings = await engine.score(request)
    assert [reading.position for reading in readings] == [96, 97, 98, 99]
    assert all(len(reading.contributions) == 2 for reading in readings)
    assert len(asked) == 4


async def test_a_failing_meter_never_ends_a_request(make_engine, request_of, collect, monkeypatch):
    """CVE-2026-44223: a tap that raises killed the engine. The tokens go on, unscored."""
    engine = make_engine()
    expected = await collect(engine, request_of([5, 6], 5))

    def explode(rows: object = None) -> None:
        raise RuntimeError("no reading")

    monkeypatch.setattr(engine._meter, "logits", explode)
    steps = await collect(engine, request_of([5, 6], 5, probe="first", contributors=2))
    assert tokens(steps) == tokens(expected)
    assert all(math.isnan(value) for step in steps for value in step.reading.logits)
    assert all(len(step.reading.logits) == 2 for step in steps)
    assert engine._forward.failed_readings == 5
    readings = await engine.score(
        ScoreRequest(request_id="s", token_ids=(5, 6, 7), start=1, probe="first")
    )
    assert [r.position for r in readings] == [0, 1, 2]
    assert engine.health().alive


async def test_absurd_alpha_ends_the_request_and_not_the_engine(make_engine, request_of, collect):
    """1e38 makes the model's logits non-finite (measured): an error, never a token."""
    engine = make_engine()
    good, bad = await asyncio.gather(
        collect(engine, request_of([5, 6], 6, probe="first")),
        collect(engine, request_of([5, 6], 6, probe="first", alpha=1e38)),
        return_exceptions=True,
    )
    assert isinstance(bad, RequestFailedError)
    assert bad.code == "nonfinite_logits"
    assert tokens(good) == tokens(await collect(engine, request_of([5, 6], 6)))


@pytest.mark.parametrize(
    "options", [{"alpha": -1.0}, {"alpha": math.nan}, {"probe": None}, {"probe": "third"}]
)
async def test_what_must_be_checked_above_is_refused_and_does_not_kill(
    make_engine, request_of, collect, options
):
    """A bug above the seam must not reach the thread, where it would end every request."""
    engine = make_engine()
    with pytest.raises(ValueError, match=r"alpha|probe"):
        await collect(engine, request_of([5], 2, **{"probe": "first", "alpha": 0.5, **options}))
    with pytest.raises(ValueError, match="do not fit"):
        await collect(engine, request_of([5] * 500, 13))
    with pytest.raises(ValueError, match="vocabulary"):
        await collect(engine, request_of([5, 96], 2))
    assert len(await collect(engine, request_of([5], 2))) == 2


def test_requests_may_come_from_one_event_loop_after_another(tiny_folder, request_of):
    """Tests and notebooks do that; a closed loop must not end the engine."""
    engine = load_transformers_engine(tiny_folder, model_id="tiny", device="cpu")

    async def stay() -> int:
        return len([step async for step in engine.generate(request_of([5], 3))])

    loop = asyncio.new_event_loop()
    stream = engine.generate(request_of([5], 300))
    loop.run_until_complete(anext(stream))
    loop.close()  # rudely, with the stream open
    assert asyncio.run(stay()) == 3
    assert engine.health().alive
    asyncio.run(engine.aclose())


async def test_nothing_is_computed_on_the_event_loop(make_engine, request_of, collect, monkeypatch):
    """One forward pass on the loop stops every other client for its time."""
    engine = make_engine()
    seen = set()
    forward = engine._forward._model.forward

    def watch(*args, **kwargs):
        seen.add(threading.current_thread().name)
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine._forward._model, "forward", watch)
    await collect(engine, request_of([5, 6], 3, probe="first"))
    assert seen == {"engine"}
    assert torch.is_inference_mode_enabled() is False


async def test_health_counts_seconds_of_work(make_engine, request_of, collect):
    """Meter overhead and stuck engines are read from these."""
    engine = make_engine()
    before = engine.health()
    await collect(engine, request_of([5, 6], 5, probe="first"))
    after = engine.health()
    assert before.forward_seconds_total == 0
    assert 0 < after.meter_seconds_total < after.forward_seconds_total
    assert after.seconds_since_step == 0
