"""OpenTelemetry, for servers with the extra `otel`: one span and one evaluation event per choice.

Names of the GenAI semantic conventions are in development and stand here only. A span is made when
its answer is over, with the times it had; nothing of a request is touched while it runs. No text.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from probes.errors import HNeuronsError
from server.answer_record import AnswerRecord, ChoiceRecord

try:
    from opentelemetry import trace
    from opentelemetry._logs import LogRecord
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise HNeuronsError(
        "otlp_traces_endpoint: OpenTelemetry is not installed; pip install 'hneurons[otel]'"
    ) from error

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue

OPERATIONS = {"chat_completions": "chat", "completions": "text_completion", "risk": "score_text"}
EVENT = "gen_ai.evaluation.result"
EVALUATION = "hallucination_risk"


class Tracing:
    """A `Recorder` that sends spans to `endpoint` and events to `/v1/logs` beside it."""

    def __init__(self, endpoint: str, *, delay_millis: float | None = None) -> None:
        resource = Resource.create(
            {"service.name": "hneurons", "service.version": version("hneurons")}
        )
        self._spans = TracerProvider(resource=resource)
        self._spans.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint), schedule_delay_millis=delay_millis)
        )
        self._events = LoggerProvider(resource=resource)
        logs = endpoint.removesuffix("/v1/traces") + "/v1/logs"
        self._events.add_log_record_processor(
            BatchLogRecordProcessor(OTLPLogExporter(logs), schedule_delay_millis=delay_millis)
        )
        self._tracer = self._spans.get_tracer("hneurons")
        self._logger = self._events.get_logger("hneurons")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, answer: AnswerRecord) -> None:
        carrier = {"traceparent": answer.traceparent} if answer.traceparent else {}
        ended = int(answer.ended * 1e9)
        operation = OPERATIONS[answer.endpoint]
        span = self._tracer.start_span(
            f"{operation} {answer.model}",
            context=self._propagator.extract(carrier),
            kind=trace.SpanKind.SERVER,
            start_time=ended - int(answer.seconds * 1e9),
            attributes=_span_attributes(answer, operation),
        )
        if answer.error is not None:
            span.set_status(trace.StatusCode.ERROR, answer.error)
            span.set_attribute("error.type", answer.error)
        context = trace.set_span_in_context(span)
        for choice in answer.choices:
            if answer.plan is not None:
                self._logger.emit(
                    LogRecord(
                        timestamp=ended,
                        context=context,
                        event_name=EVENT,
                        attributes=_event_attributes(answer, choice),
                    )
                )
        span.end(ended)

    def close(self) -> None:
        self._spans.shutdown()
        self._events.shutdown()


def _span_attributes(answer: AnswerRecord, operation: str) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "hneurons",
        "gen_ai.request.model": answer.model,
        "gen_ai.response.id": answer.answer_id,
        "gen_ai.response.finish_reasons": [
            choice.finish_reason for choice in answer.choices if choice.finish_reason is not None
        ],
        "gen_ai.usage.input_tokens": answer.prompt_tokens,
        "gen_ai.usage.output_tokens": answer.completion_tokens,
        "hneurons.request.id": answer.request_id,
    }
    return attributes | _provenance(answer)


def _event_attributes(answer: AnswerRecord, choice: ChoiceRecord) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "gen_ai.evaluation.name": EVALUATION,
        "gen_ai.response.id": answer.answer_id,
    }
    risk = choice.risk
    if risk is None or risk.score is None:
        attributes["gen_ai.evaluation.score.label"] = "unavailable"
        attributes["error.type"] = answer.error or (risk.reason if risk else None) or "unscored"
    else:
        attributes["gen_ai.evaluation.score.value"] = risk.score
        attributes["gen_ai.evaluation.score.label"] = "flagged" if risk.is_flagged else "passed"
        attributes["hneurons.risk.status"] = risk.status
    return attributes | _provenance(answer)


def _provenance(answer: AnswerRecord) -> dict[str, AttributeValue]:
    """Which reader said it; the conventions have no names for that yet."""
    plan = answer.plan
    if plan is None:
        return {}
    return {
        "hneurons.probe.id": plan.probe.id,
        "hneurons.probe.sha256": plan.probe.sha256,
        "hneurons.alpha": plan.alpha,
        "hneurons.threshold": plan.response_threshold,
    }
