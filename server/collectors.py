"""What is read at the moment of a scrape: the engine's own totals."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engines.base import Health


class EngineCollector(Collector):
    """Gauges and totals that only the engine knows; one look per scrape."""

    def __init__(self, model_name: str, health: Callable[[], Health]) -> None:
        self._model_name = model_name
        self._health = health

    def collect(self) -> Iterator[Metric]:
        health = self._health()
        gauges = {
            "engine_alive": ("1 while the engine can work.", float(health.alive)),
            "requests_running": ("Requests that are decoding.", health.running),
            "requests_waiting": ("Requests in the queue.", health.waiting),
            "waiting_prompt_tokens": ("Prompt tokens in the queue.", health.waiting_tokens),
            "seconds_since_step": ("Since the last pass; 0 while idle.", health.seconds_since_step),
        }
        if health.cache_usage is not None:
            gauges["kv_cache_usage_ratio"] = ("Of vLLM's blocks, held now.", health.cache_usage)
        counters: dict[str, tuple[str, float]] = {
            "forward_seconds": ("Time in forward passes.", health.forward_seconds_total),
            "cached_prompt_tokens": (
                "Prompt tokens that were not read again.",
                health.cached_tokens_total,
            ),
        }
        optional = {
            "meter_seconds": ("Time spent in the meter.", health.meter_seconds_total),
            "preemptions": ("Requests that had to begin again.", health.preemptions_total),
            "draft_tokens": ("Tokens that were guessed.", health.draft_tokens_total),
            "accepted_draft_tokens": (
                "Guessed tokens that stand.",
                health.accepted_draft_tokens_total,
            ),
        }
        counters |= {name: (text, v) for name, (text, v) in optional.items() if v is not None}
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"hneurons_{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"hneurons_{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
