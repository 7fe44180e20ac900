"""Spans and evaluation events as a collector receives them, over OTLP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from server.engines.fake import FakeEngine
from server.tracing import Tracing

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(HTTPServer):
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[tuple[str, bytes]] = []

    @property
    def spans(self) -> list[Any]:
        messages = [ExportTraceServiceRequest.FromString(b) for b in self._bodies("/v1/traces")]
        scopes = [s for m in messages for r in m.resource_spans for s in r.scope_spans]
        return [span for scope in scopes for span in scope.spans]

    @property
    def events(self) -> list[Any]:
        messages = [ExportLogsServiceRequest.FromString(b) for b in self._bodies("/v1/logs")]
        scopes = [s for m in messages for r in m.resource_logs for s in r.scope_logs]
        return [record for scope in scopes for record in scope.log_records]

    def _bodies(self, path: str) -> list[bytes]:
        return [body for where, body in self.received if where == path]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        self.server.received.append((self.path, self.rfile.read(length)))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def attributes(item: Any) -> dict[str, Any]:
    found = {}
    for pair in item.attributes:
        kind = pair.value.WhichOneof("value")
        found[pair.key] = getattr(pair.value, kind)
    return found


async def test_an_answer_is_a_span_with_one_evaluation_event_per_choice(
    open_wire: Any, collector: Collector
) -> None:
    """Which probe said what must be found from the trace of the application that asked."""
    engine = FakeEngine()
    tracing = Tracing(f"http://127.0.0.1:{collector.server_port}/v1/traces")
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
