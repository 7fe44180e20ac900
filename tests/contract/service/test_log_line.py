"""What the operator reads about each request."""

from __future__ import annotations

import json
from typing import Any

import pytest


@pytest.mark.parametrize("stream", [False, True])
def test_each_request_leaves_one_line_that_says_how_it_was_monitored(
    start_server: Any, stream: bool
) -> None:
    """Prevents: a log from which one cannot tell which probe, which alpha and what was flagged."""
    with start_server() as server:
        server.chat("hi 42", stream=stream, max_tokens=5, n=2, risk={"alpha": 0.5})
        server.chat("hi", stream=stream, max_tokens=5)
        server.close()
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    monitored, plain = (line for line in lines if line["message"] == "request")
    assert monitored["route"] == "/v1/chat/completions"
    assert monitored["completion_tokens"] == 10
    assert monitored["finish_reasons"] == ["length", "length"]
    assert monitored["probe"].startswith("fake")
    assert monitored["alpha"] == 0.5
    assert all(flag in (True, False) for flag in monitored["flagged"])
    assert len(monitored["flagged"]) == 2
    assert (plain["probe"], plain["alpha"], plain["flagged"]) == (None, None, [None])
