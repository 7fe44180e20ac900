"""Probes change while requests run: each is read by the probe that it began with."""

from __future__ import annotations

import asyncio

import pytest

from server.engines.base import ReloadingEngine


def readings(steps):
    return [step.reading.logits for step in steps if step.reading is not None]


async def test_a_change_of_probes_moves_no_reading(
    make_engine, tiny_probes, request_of, collect, eventually
):
    """R15: a reader that changes in the middle of an answer gives risks of nobody."""
    first, second = tiny_probes
    alone = make_engine()
    old = request_of([5, 6, 7], 200, probe=first.id, read_last=True)
    new = request_of([9, 8], 20, probe=second.id, read_last=True)
    suppressed = request_of([9, 8], 20, probe=second.id, alpha=0.0)
    expected = [await collect(alone, request) for request in (old, new, suppressed)]

    engine = make_engine(probes=(first,))
    assert isinstance(engine, ReloadingEngine)
    running = asyncio.create_task(collect(engine, old))
    await eventually(lambda: engine.health().running == 1)
    await engine.attach([second])
    assert list(engine.probes) == [first]
    engine.offer([second])
    beside = await asyncio.gather(collect(engine, new), collect(engine, suppressed))
    found = [await running, *beside]
    await engine.detach()
    found.append(await collect(engine, new))
    for steps, wanted in zip(found, [*expected, expected[1]], strict=True):
        assert [step.token_id for step in steps] == [step.token_id for step in wanted]
        assert [value for row in readings(steps) for value in row] == pytest.approx(
            [value for row in readings(wanted) for value in row], abs=1e-5
        )
    assert list(engine.probes) == [second]
    with pytest.raises(ValueError, match="no probe"):
        await collect(engine, old)


async def test_the_order_of_probes_may_change_under_a_request(
    make_engine, tiny_probes, request_of, collect, eventually
):
    """Rows know their probe by its place: a place that moves must move with them."""
    second = tiny_probes[1]
    alone = make_engine()
    request = request_of([5, 6, 7], 200, probe=second.id, read_last=True)
    expected = await collect(alone, request)
    engine = make_engine()
    running = asyncio.create_task(collect(engine, request))
    await eventually(lambda: engine.health().running == 1)
    engine.offer([second])  # it stood at the second place
    await engine.detach()
    steps = await running
    assert [value for row in readings(steps) for value in row] == pytest.approx(
        [value for row in readings(expected) for value in row], abs=1e-5
    )


async def test_a_counter_of_meter_seconds_never_falls(
    make_engine, tiny_probes, request_of, collect
):
    """A new meter begins at zero; Prometheus would see a restart."""
    engine = make_engine()
    await collect(engine, request_of([5, 6, 7], 20, probe="first"))
    before = engine.health().meter_seconds_total
    engine.offer(tiny_probes[:1])
    await engine.detach()
    assert engine.health().meter_seconds_total >= before > 0
