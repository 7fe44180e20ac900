"""What the worker does to vLLM besides metering."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np


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


def test_a_step_that_puts_nothing_out_is_a_sign_of_life():
    """A long prompt is read in chunks for a minute and more; the server took that for a hang."""
    from server.engines.vllm.worker import _HandsOn

    class Scheduler:
        requests: ClassVar[dict[str, object]] = {}

        def update_from_output(self, *_: object) -> dict[int, object]:
            return {}

    class HandsOn(_HandsOn, Scheduler):
        pass

    (outputs,) = HandsOn().update_from_output(None, SimpleNamespace()).values()
    assert outputs.outputs == []
    assert outputs.scheduler_stats is not None  # or vLLM's client drops it
