"""Spans and evaluation events as a collector receives them, over OTLP."""

from __future__ import annotations

from typing import Any

from server.engines.fake import FakeEngine
from server.tracing import Tracing

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def attributes(item: Any) -> dict[str, Any]:
    found = {}
    for pair in item.attributes:
        kind = pair.value.WhichOneof("value")
        found[pair.key] = getattr(pair.value, kind)
    return found


async def test_an_answer_is_a_span_with_one_evaluation_event_per_choice(
    open_wire: Any, collector: Any
) -> None:
    """Which probe said what must be found from the trace of the application that asked."""
    engine = FakeEngine()
    tracing = Tracing(collector.endpoint)
    async with open_wire(engine, recorders=(tracing,)) as wire:
        wire.http.headers["traceparent"] = f"00-{TRACE}-{PARENT}-01"
        answer = (await wire.chat("canary 1969", risk=True, n=2)).json()
        del wire.http.headers["traceparent"]
        await wire.chat("[fail:2]canary", risk=True)
        await wire.chat("canary")
    tracing.close()
    span, failed, unmonitored = collector.spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == "chat fake"
    assert span.end_time_unix_nano > span.start_time_unix_nano
    assert attributes(span)["gen_ai.response.id"] == answer["id"]
    assert attributes(span)["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"]
    assert attributes(failed)["error.type"] == "nonfinite_logits"
    assert "hneurons.probe.id" not in attributes(unmonitored)

    first, second, unscored = collector.events
    assert {event.event_name for event in collector.events} == {"gen_ai.evaluation.result"}
    assert first.span_id == second.span_id == span.span_id
    scores = [attributes(event)["gen_ai.evaluation.score.value"] for event in (first, second)]
    assert scores == [choice["risk"]["score"] for choice in answer["choices"]]
    assert attributes(first)["hneurons.probe.sha256"] == engine.probes[0].sha256
    assert attributes(first)["gen_ai.evaluation.score.label"] == "flagged"
    # An answer that could not be scored has no number, never a low one.
    assert "gen_ai.evaluation.score.value" not in attributes(unscored)
    assert attributes(unscored)["error.type"] == "nonfinite_logits"
    assert not any(b"canary" in body for _, body in collector.received)
