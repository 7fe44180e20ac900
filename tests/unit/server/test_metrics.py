"""Names, labels and cardinality of what is exported."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families

from server.engines.base import Health
from server.metrics import Metrics

LABELS = {"model_name", "probe", "endpoint", "reason", "status", "finished_reason", "action"}
LABELS |= {"suppressed", "position", "le"}


def families(metrics):
    return list(text_string_to_metric_families(metrics.render().decode()))


def test_names_follow_prometheus_and_labels_come_from_a_closed_set():
    """A label that a client can choose is a memory leak."""
    metrics = Metrics(model_name="m", health=lambda: Health(alive=True, running=2))
    metrics.request_accepted("risk", prompt_tokens=3)
    metrics.request_rejected("unauthorized")
    metrics.request_failed("engine_dead")
    metrics.request_aborted("disconnect")
    metrics.choice_finished("stop")
    metrics.token_written()
    metrics.policy_acted("p@1", action="withheld")
    metrics.probe_loaded("p@1", position="read")
    for family in families(metrics):
        assert re.fullmatch(r"hneurons_[a-z_]+", family.name)
        assert family.documentation
        for sample in family.samples:
            assert set(sample.labels) <= LABELS
            assert sample.labels["model_name"] == "m"
            if family.type == "counter":
                assert sample.name.endswith("_total")


def test_gauges_are_read_when_scraped():
    """A gauge that is set on events goes stale in exactly the minutes that matter."""
    now = Health(alive=True, running=2, waiting=1, waiting_tokens=7, meter_seconds_total=0.5)
    metrics = Metrics(model_name="m", health=lambda: now)

    def value(name):
        samples = [s for f in families(metrics) for s in f.samples if s.name == name]
        return samples[0].value

    assert value("hneurons_requests_running") == 2
    assert value("hneurons_meter_seconds_total") == 0.5
    now = Health(alive=False, reason="gone")
    assert value("hneurons_requests_running") == 0
    assert value("hneurons_engine_alive") == 0


def test_two_servers_in_one_process_do_not_share_counters():
    """The default registry is global: tests, and embedded servers, would add up."""
    first, second = Metrics(model_name="a"), Metrics(model_name="b")
    first.token_written()
    written = [
        sample.value
        for metrics in (first, second)
        for family in families(metrics)
        for sample in family.samples
        if sample.name == "hneurons_generation_tokens_total"
    ]
    assert written == [1, 0]
