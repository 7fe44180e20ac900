"""Names, labels and cardinality of what is exported."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from probes.card import ReferenceRisks
from server.engines.base import Health, Reading
from server.engines.fake_model import fake_probe
from server.metrics import Metrics
from server.monitor import RiskPlan, Token, score, summarise

LABELS = {"model_name", "probe", "endpoint", "reason", "status", "finished_reason", "action"}
LABELS |= {"suppressed", "position", "le", "bin", "result", "version"}


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
    metrics.first_token(0.1)
    metrics.policy_acted("p@1", action="withheld")
    metrics.show_probes([fake_probe()])
    metrics.probes_reloaded("loaded")
    metrics.audit_failed()
    for family in families(metrics):
        if family.name.startswith("process_"):  # Prometheus' own names for what every process has
            continue
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
    # No clock is no series: 0 would say that the meter costs nothing.
    for name in ("meter_seconds_total", "preemptions_total", "kv_cache_usage_ratio"):
        with pytest.raises(IndexError):
            value(f"hneurons_{name}")
    now = Health(alive=True, cache_usage=0.25, preemptions_total=3, draft_tokens_total=9)
    assert value("hneurons_kv_cache_usage_ratio") == 0.25
    assert value("hneurons_preemptions_total") == 3
    assert value("hneurons_draft_tokens_total") == 9
    now = Health(alive=False, reason="gone")
    assert value("hneurons_requests_running") == 0
    assert value("hneurons_engine_alive") == 0


def test_two_servers_in_one_process_do_not_share_counters():
    """The default registry is global: tests, and embedded servers, would add up."""
    first, second = Metrics(model_name="a"), Metrics(model_name="b")
    first.first_token(0.1)
    written = [
        sample.value
        for metrics in (first, second)
        for family in families(metrics)
        for sample in family.samples
        if sample.name == "hneurons_generation_tokens_total"
    ]
    assert written == [1, 0]


def samples(metrics, name):
    """Sample values by label values, from the last label's name to the first, without the model."""
    return {
        tuple(v for k, v in sorted(sample.labels.items())[::-1] if k != "model_name"): sample.value
        for family in families(metrics)
        for sample in family.samples
        if sample.name == name
    }


def plan_of(probe, *, alpha=1.0):
    return RiskPlan(
        probe=probe,
        alpha=alpha,
        token_threshold=0.5,
        response_threshold=0.5,
        operating_point=None,
        contributors=0,
        with_tokens=True,
        policy="flag",
    )


def monitored(metrics, plan, logits):
    readings = [Reading(i, (logit, logit)) for i, logit in enumerate(logits)]
    tokens = [score(plan, Token(1, "a", i, i + 1), r) for i, r in enumerate(readings)]
    metrics.response_monitored(summarise(plan, tokens), tokens)


def test_calibrated_risks_are_counted_in_the_bins_of_the_card():
    """Drift is measured from these; a suppressed answer is another distribution on purpose."""
    metrics, probe = Metrics(model_name="m"), fake_probe()
    metrics.show_probes([probe])
    reference = probe.card.token.reference
    monitored(metrics, plan_of(probe), [-5.0, 3.0, 3.0, float("nan")])
    monitored(metrics, plan_of(probe, alpha=0.5), [3.0])
    binned = samples(metrics, "hneurons_binned_tokens_total")
    assert binned == {
        (probe.id, f"{i:02}"): {0: 1, len(reference.edges): 2}.get(i, 0)
        for i in range(len(reference.shares))
    }
    shares = samples(metrics, "hneurons_reference_bin_ratio")
    assert tuple(shares.values()) == reference.shares


def test_every_series_of_a_probe_begins_at_zero():
    """A counter that appears with its first event has no rate for it: the first NaN is missed."""
    metrics, probe = Metrics(model_name="m"), fake_probe()
    metrics.show_probes([probe])
    assert samples(metrics, "hneurons_unscored_tokens_total") == {
        (reason, probe.id): 0 for reason in ("not_read", "nonfinite")
    }
    assert samples(metrics, "hneurons_flagged_tokens_total") == {(probe.id,): 0}
    assert len(samples(metrics, "hneurons_failed_requests_total")) == 8


def test_a_probe_that_is_gone_is_shown_no_more():
    """Two probes on one replica after a switch would look like a shadow."""
    metrics = Metrics(model_name="m")
    old, new = fake_probe("old"), fake_probe("new")
    metrics.show_probes([old])
    metrics.show_probes([new])
    assert list(samples(metrics, "hneurons_probe_info")) == [(new.id, "read")]
    assert {key[0] for key in samples(metrics, "hneurons_reference_bin_ratio")} == {new.id}


def test_edges_of_reference_risks_belong_to_the_bin_above():
    """Off by one bin, and the same traffic drifts."""
    reference = ReferenceRisks(edges=(0.1, 0.5), shares=(0.5, 0.25, 0.25))
    assert [reference.bin(risk) for risk in (0.0, 0.1, 0.49, 0.5, 1.0)] == [0, 1, 1, 2, 2]
    for edges, shares in (((0.5, 0.1), (0.5, 0.25, 0.25)), ((0.5,), (1.0, 0.0)), ((), (0.9,))):
        with pytest.raises(ValueError, match=r"reference|shares"):
            ReferenceRisks(edges=edges, shares=shares)
