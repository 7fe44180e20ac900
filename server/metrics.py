"""Every metric of the server, declared once, in a registry of its own.

Names begin with `hneurons_` and follow Prometheus' rules: base units, `_total` for counters. Label
values come from closed sets only (served model, loaded probes, fixed words), never from a request.
"""

from __future__ import annotations

from collections import Counter as Counted
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from probes.probe import Probe
from server.collectors import EngineCollector
from server.engines.base import Health
from server.monitor import RiskSummary, Status, Token, Unscored
from server.policy import Ended

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# vLLM's time buckets, so that its dashboards can be reused.
_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
_REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_RISK = tuple(round(0.05 * step, 2) for step in range(1, 21))
# Closed sets of label values; their series begin at zero, so that a rate sees the first event.
ENDPOINTS = ("chat_completions", "completions", "risk")
FAILURES = (
    *("engine_dead", "engine_error", "internal_error", "monitor_failed", "no_finish"),
    *("nonfinite_logits", "overloaded", "slow_client"),
)
ABORTS = ("disconnect", "slow_client")
ACTIONS = ("stopped", "withheld", "retried")
RELOADS = ("loaded", "rejected")


class Metrics:
    """Counters and histograms of one server; the engine's gauges are read when scraped."""

    def __init__(self, *, model_name: str, health: Callable[[], Health] | None = None) -> None:
        # Process-wide: without it every counter is exported twice.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._requests = self._counter("requests", "Requests that passed validation.", ["endpoint"])
        self._choices = self._counter(
            "choices", "Generated choices by the way they ended.", ["finished_reason"]
        )
        self._rejected = self._counter(
            "rejected_requests", "Requests answered with an error before generation.", ["reason"]
        )
        self._failures = self._counter(
            "failed_requests", "Requests that failed after they were accepted.", ["reason"]
        )
        self._aborts = self._counter(
            "aborted_requests", "Generations ended because nobody waits for them.", ["reason"]
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens.", [])
        self._written = self._counter("generation_tokens", "Written tokens.", []).labels(model_name)
        self._scored = self._counter("scored_tokens", "Tokens with a risk.", ["probe"])
        self._unscored = self._counter(
            "unscored_tokens", "Tokens with text whose risk is null.", ["probe", "reason"]
        )
        self._flagged = self._counter(
            "flagged_tokens", "Tokens at or above their threshold.", ["probe"]
        )
        self._responses = self._counter(
            "monitored_responses", "Choices with risk, by status.", ["probe", "status"]
        )
        self._flagged_responses = self._counter(
            "flagged_responses", "Choices at or above the response threshold.", ["probe"]
        )
        self._suppressed = self._counter(
            "suppressed_responses",
            "Choices generated or scored with alpha other than 1.",
            ["probe"],
        )
        self._binned = self._counter(
            "binned_tokens", "Calibrated tokens by bin of the card's reference.", ["probe", "bin"]
        )
        self._reference = self._gauge(
            "reference_bin_ratio", "Share of each bin in the card's reference.", ["probe", "bin"]
        )
        self._actions = self._counter(
            "policy_actions", "What a policy did to an answer.", ["probe", "action"]
        )
        self._token_risk = self._histogram(
            "token_risk_ratio", "Risk of a token, higher is worse.", ["probe", "suppressed"], _RISK
        )
        self._response_risk = self._histogram(
            "response_risk_ratio",
            "Risk of a choice, higher is worse.",
            ["probe", "suppressed"],
            _RISK,
        )
        # Used for every token: the label is bound once.
        self._first_token = self._histogram(
            "time_to_first_token_seconds",
            "From the request to its first written token.",
            [],
            _FIRST_TOKEN_SECONDS,
        ).labels(model_name)
        self._inter_token = self._histogram(
            "inter_token_latency_seconds",
            "Between two written tokens of a choice.",
            [],
            _INTER_TOKEN_SECONDS,
        ).labels(model_name)
        self._request_seconds = self._histogram(
            "request_duration_seconds",
            "From the request to the end of its answer.",
            ["endpoint"],
            _REQUEST_SECONDS,
        )
        self._probe_info = self._gauge(
            "probe_info", "Probes that are loaded; always 1.", ["probe", "position"]
        )
        self._reloads = self._counter(
            "probe_reloads", "Times that probes were read again, by what came of it.", ["result"]
        )
        self._audit_failures = self._counter(
            "audit_failures", "Audit records that could not be written.", []
        ).labels(model_name)
        self._gauge("build_info", "What runs; always 1.", ["version"]).labels(
            model_name, version("hneurons")
        ).set(1)
        for counter, values in (
            (self._failures, FAILURES),
            (self._aborts, ABORTS),
            (self._requests, ENDPOINTS),
            (self._choices, get_args(Ended)),
            (self._rejected, ("overloaded",)),
            (self._reloads, RELOADS),
        ):
            for value in values:
                counter.labels(model_name, value)
        ProcessCollector(registry=self.registry)
        if health is not None:
            self.registry.register(EngineCollector(model_name, health))

    def show_probes(self, probes: Sequence[Probe]) -> None:
        """These are loaded now, with all their series from zero: a rate needs a first sample."""
        self._probe_info.clear()
        self._reference.clear()
        for probe in probes:
            labels = (self._model_name, probe.id)
            self._probe_info.labels(*labels, probe.card.position).set(1)
            for counter in (
                self._scored, self._flagged, self._flagged_responses, self._suppressed
            ):  # fmt: skip
                counter.labels(*labels)
            for reason in get_args(Unscored):
                self._unscored.labels(*labels, reason)
            for status in get_args(Status):
                self._responses.labels(*labels, status)
            for action in ACTIONS:
                self._actions.labels(*labels, action)
            for i, share in enumerate(probe.card.token.reference.shares):
                self._reference.labels(*labels, f"{i:02}").set(share)
                self._binned.labels(*labels, f"{i:02}")

    def probes_reloaded(self, result: str) -> None:
        """`loaded` or `rejected`."""
        self._reloads.labels(self._model_name, result).inc()

    def request_accepted(self, endpoint: str, *, prompt_tokens: int) -> None:
        self._requests.labels(self._model_name, endpoint).inc()
        self._prompt_tokens.labels(self._model_name).inc(prompt_tokens)

    def request_rejected(self, reason: str) -> None:
        """`reason` must be one of our own words (an error code), never client input."""
        self._rejected.labels(self._model_name, reason).inc()

    def request_failed(self, reason: str) -> None:
        self._failures.labels(self._model_name, reason).inc()

    def request_aborted(self, reason: str) -> None:
        self._aborts.labels(self._model_name, reason).inc()

    def request_finished(self, endpoint: str, *, seconds: float) -> None:
        self._request_seconds.labels(self._model_name, endpoint).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """One token more; by the engine, for whatever answer: also those that nobody gets."""
        self._written.inc()
        self._first_token.observe(seconds)

    def next_tokens(self, gaps: Sequence[float]) -> None:
        """As many tokens more, so many seconds after the one before."""
        self._written.inc(len(gaps))
        for seconds in gaps:
            self._inter_token.observe(seconds)

    def choice_finished(self, finished_reason: str) -> None:
        self._choices.labels(self._model_name, finished_reason).inc()

    def policy_acted(self, probe: str, *, action: str) -> None:
        self._actions.labels(self._model_name, probe, action).inc()

    def response_monitored(self, risk: RiskSummary, tokens: Sequence[Token]) -> None:
        """One complete generation, or one given text: its status, its risks, what has none."""
        model, probe, plan = self._model_name, risk.plan.probe.id, risk.plan
        suppressed = "false" if plan.alpha == 1 else "true"
        self._responses.labels(model, probe, risk.status).inc()
        self._flagged.labels(model, probe).inc(sum(token.is_flagged for token in tokens))
        if plan.alpha != 1:
            self._suppressed.labels(model, probe).inc()
        if risk.is_flagged:
            self._flagged_responses.labels(model, probe).inc()
        if risk.score is not None:
            self._response_risk.labels(model, probe, suppressed).observe(risk.score)
        scored = [token.risk for token in tokens if token.risk is not None]
        self._scored.labels(model, probe).inc(len(scored))
        histogram = self._token_risk.labels(model, probe, suppressed)
        for value in scored:
            histogram.observe(value)
        if plan.is_calibrated:
            bins = map(plan.probe.card.token.reference.bin, scored)
            for bin_, count in Counted(bins).items():
                self._binned.labels(model, probe, f"{bin_:02}").inc(count)
        for token in tokens:
            # The end of the turn is never read; counting it would hide what really went wrong.
            if token.unscored is not None and token.text:
                self._unscored.labels(model, probe, token.unscored).inc()

    def audit_failed(self) -> None:
        self._audit_failures.inc()

    def render(self) -> bytes:
        """The page for `GET /metrics`, of type `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, labels: Iterable[str]) -> Gauge:
        return Gauge(f"hneurons_{name}", text, ["model_name", *labels], registry=self.registry)

    def _counter(self, name: str, text: str, labels: Iterable[str]) -> Counter:
        return Counter(f"hneurons_{name}", text, ["model_name", *labels], registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: Iterable[str], buckets: Sequence[float]
    ) -> Histogram:
        names = ["model_name", *labels]
        return Histogram(f"hneurons_{name}", text, names, buckets=buckets, registry=self.registry)
