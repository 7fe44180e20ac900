"""What the worker does to vLLM besides metering."""

import asyncio
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest


def test_of_a_request_with_drafts_one_reading_is_kept_for_each_new_token():
    """Two of three drafts stood, and the answer ended with the second of the three new tokens."""
    from server.engines.vllm.worker import _leave_out_rejected

    segments = {
        "drafted": np.arange(8, dtype=np.float32),  # four readings of two numbers
        "plain": np.arange(2, dtype=np.float32),
        "unread": np.empty(0, dtype=np.float32),
    }
    outputs = [
        SimpleNamespace(request_id="drafted", new_token_ids=[5, 6]),
        SimpleNamespace(request_id="plain", new_token_ids=[5]),
        SimpleNamespace(request_id="unread", new_token_ids=[5, 6]),
        SimpleNamespace(request_id="other", new_token_ids=[5, 6]),
    ]
    drafts = {"drafted": [1, 2, 3], "unread": [1], "other": [1]}
    _leave_out_rejected(outputs, segments, drafts)
    assert {name: part.tolist() for name, part in segments.items()} == {
        "drafted": [0, 1, 2, 3], "plain": [0, 1], "unread": [],
    }  # fmt: skip


def hands_on(by_client: dict[int, Any]) -> Any:
    """A scheduler of ours over one that puts `by_client` out."""
    from server.engines.vllm.worker import _HandsOn

    class Scheduler:
        requests: ClassVar[dict[str, object]] = {}
        kv_cache_manager = SimpleNamespace(usage=0.25)

        def update_from_output(self, *_: object) -> dict[int, Any]:
            return by_client

    class HandsOn(_HandsOn, Scheduler):
        pass

    return HandsOn()


def scheduled(**drafts: list[int]) -> SimpleNamespace:
    return SimpleNamespace(
        preempted_req_ids={"x"},
        scheduled_spec_decode_tokens=drafts,
        num_invalid_spec_tokens={"a": 1},
    )


def test_a_step_that_puts_nothing_out_is_a_sign_of_life():
    """A long prompt is read in chunks for a minute and more; the server took that for a hang."""
    (outputs,) = hands_on({}).update_from_output(scheduled(), SimpleNamespace()).values()
    assert outputs.outputs == []
    assert outputs.scheduler_stats is not None  # or vLLM's client drops it


def test_a_silent_step_right_after_a_word_says_nothing():
    """In a pipeline an empty step follows each pass: that would be two messages for each token."""
    output = SimpleNamespace(request_id="a", new_token_ids=[5])
    by_client: dict[int, Any] = {0: SimpleNamespace(outputs=[output], scheduler_stats=None)}
    scheduler = hands_on(by_client)
    scheduler.update_from_output(scheduled(), SimpleNamespace())
    by_client.clear()
    assert scheduler.update_from_output(scheduled(), SimpleNamespace()) == {}
    scheduler._last_word -= 1
    assert scheduler.update_from_output(scheduled(), SimpleNamespace())
    by_client.clear()
    assert scheduler.update_from_output(scheduled(), SimpleNamespace()) == {}


def test_what_only_the_scheduler_knows_is_told_now_and_then():
    from server.engines.vllm.worker import STATISTICS_EVERY

    output = SimpleNamespace(request_id="a", new_token_ids=[5, 6])
    outputs = SimpleNamespace(outputs=[output], scheduler_stats=None)
    scheduler, told = hands_on({0: outputs}), []
    for _ in range(2 * STATISTICS_EVERY):
        outputs.scheduler_stats = None
        scheduler.update_from_output(scheduled(a=[1, 2, 3]), SimpleNamespace())
        told.append(outputs.scheduler_stats)
    assert [i + 1 for i, one in enumerate(told) if one] == [STATISTICS_EVERY, 2 * STATISTICS_EVERY]
    assert told[-1].kv_cache_usage == 0.25
    assert told[-1].kv_connector_stats == {
        "preempted": 2 * STATISTICS_EVERY,
        "drafted": 4 * STATISTICS_EVERY,
        "accepted": 2 * STATISTICS_EVERY,
    }


async def test_an_engine_whose_outputs_nobody_hands_on_is_dead():
    """vLLM ends that task at the first output it cannot read; without a request nobody would know,
    and the next one would be sent there."""
    from server.engines.vllm.engine import VllmEngine

    async def broken() -> None:
        raise ValueError("undecodable")

    told: list[Exception] = []
    task = asyncio.ensure_future(broken())
    engine = object.__new__(VllmEngine)
    engine._dead = ""
    engine._processes = SimpleNamespace(trouble=lambda: "")
    engine._llm = SimpleNamespace(
        output_handler=None, output_processor=SimpleNamespace(propagate_error=told.append)
    )
    engine._look_at_processes()  # before the first request there is none
    engine._llm.output_handler = task
    engine._look_at_processes()
    assert engine._dead == ""
    with pytest.raises(ValueError, match="undecodable"):
        await task
    engine._look_at_processes()
    assert engine._dead == "vLLM's output task has ended; its log says why"
    assert len(told) == 1
