"""New probes while the server serves: by SIGHUP on one, and replica by replica behind the proxy."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from probes.probe import Probe
from server.engines.fake_model import fake_probe

SLOW = "[slow:80]the year is 1969 and 42"


def saved(folder: Path, name: str, **model: str) -> Probe:
    """A probe in folder/name; `model` overrides fields of the model it is bound to."""
    probe = fake_probe(name)
    identity = msgspec.structs.replace(probe.card.model, **model)
    card = msgspec.structs.replace(probe.card, model=identity)
    probe = dataclasses.replace(probe, card=card)
    probe.save(folder / name)
    return probe


def point(link: Path, name: str) -> None:
    """Move the link in one step, as docs/operations.md says."""
    draft = link.with_name("draft")
    draft.symlink_to(name)
    draft.rename(link)


@pytest.fixture(scope="module")
def stage(
    start_in: Any,
    start_prometheus: Callable[..., AbstractContextManager[Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SimpleNamespace]:
    """One server on probes/current, watched by Prometheus."""
    folder = tmp_path_factory.mktemp("reload")
    old = saved(folder, "old")
    link = folder / "current"
    point(link, "old")
    with (
        start_in(folder, "--probe", str(link)) as server,
        start_prometheus(folder, [server.port]) as prometheus,
    ):
        yield SimpleNamespace(
            folder=folder, old=old, link=link, server=server, prometheus=prometheus
        )


def reload(stage: Any, tools: Any) -> None:
    """SIGHUP, until it is carried out or refused."""
    before = stage.server.metric("hneurons_probe_reloads_total")
    stage.server.process.send_signal(signal.SIGHUP)
    tools.wait_for(
        lambda: stage.server.metric("hneurons_probe_reloads_total") > before, "the reload"
    )


def probe_of(answer: Any) -> str:
    found: str = answer.json()["choices"][0]["risk"]["probe"]
    return found


@pytest.mark.parametrize("fault", ["missing", "damaged", "wrong model", "wrong answers"])
def test_a_bad_probe_is_refused_and_the_old_one_stays(
    stage: Any, tools: Any, fault: str, tmp_path: Path
) -> None:
    """A monitor that dies of a bad file at reload is worse than one that never reloads."""
    name = fault.replace(" ", "-")
    if fault == "damaged":
        saved(stage.folder, name)
        (stage.folder / name / "probe.safetensors").write_bytes(b"x" * 100)
    elif fault == "wrong model":
        saved(stage.folder, name, weights_fingerprint="0" * 64)
    elif fault == "wrong answers":
        probe = saved(tmp_path, name)
        answers = tuple(
            msgspec.structs.replace(a, logits=tuple((9.0, 9.0) for _ in a.logits))
            for a in probe.card.known_answers
        )
        card = msgspec.structs.replace(probe.card, known_answers=answers)
        dataclasses.replace(probe, card=card).save(stage.folder / name)
    rejected = stage.server.metric('hneurons_probe_reloads_total{model_name="m",result="rejected"}')
    point(stage.link, name)
    reload(stage, tools)
    assert (
        stage.server.metric('hneurons_probe_reloads_total{model_name="m",result="rejected"}')
        == rejected + 1
    )
    assert probe_of(stage.server.chat(risk=True)) == stage.old.id
    lines = [json.loads(line) for line in stage.server.log.read_text().splitlines()]
    (*_, last) = [line for line in lines if line["message"] == "probe reload rejected"]
    assert last["level"] == "ERROR"
    assert {
        "missing": "no folder",
        "damaged": "damaged",
        "wrong model": "weights_fingerprint",
        "wrong answers": "known answer",
    }[fault] in last["reason"]
    tools.wait_for(lambda: "HNeuronsProbeRejected" in stage.prometheus.firing(), "the alert")
    point(stage.link, "old")
    reload(stage, tools)
    tools.wait_for(lambda: "HNeuronsProbeRejected" not in stage.prometheus.firing(), "it clears")


def test_an_answer_keeps_its_probe_and_the_next_one_gets_the_new(stage: Any, tools: Any) -> None:
    """I11: one probe per response, whatever happens meanwhile."""
    new = saved(stage.folder, "new")
    with stage.server.stream(SLOW, risk=True) as lines:
        point(stage.link, "new")
        reload(stage, tools)
        assert probe_of(stage.server.chat(risk=True)) == new.id
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    summaries = [
        choice["risk"]["probe"]
        for event in events
        for choice in event["choices"]
        if choice["finish_reason"]
    ]
    assert summaries == [stage.old.id]
    shown = stage.server.client.get("/metrics").text
    assert f'hneurons_probe_info{{model_name="m",position="read",probe="{new.id}"}} 1.0' in shown
    assert f'hneurons_probe_info{{model_name="m",position="read",probe="{stage.old.id}"}}' not in (
        shown
    )


def test_two_replicas_change_their_probe_one_after_the_other(
    start_in: Any, start_nginx: Any, start_prometheus: Any, tools: Any, tmp_path: Path
) -> None:
    """A rollout that fails a request, or that nobody can watch, is done at night or never."""
    old, new = saved(tmp_path, "old"), saved(tmp_path, "new")
    drain = ("--drain-delay", "1", "--drain-timeout", "10")
    with ExitStack() as stack:
        first = stack.enter_context(start_in(tmp_path, *drain, "--probe", str(tmp_path / "old")))
        second = stack.enter_context(start_in(tmp_path, *drain, "--probe", str(tmp_path / "old")))
        ports = [first.port, second.port]
        prometheus = stack.enter_context(start_prometheus(tmp_path, ports))
        proxy = stack.enter_context(start_nginx(tmp_path, ports))
        crowd = [stack.enter_context(tools.Traffic(proxy.port, SLOW)) for _ in range(3)]

        def shown() -> set[str]:
            """`port probe`, as the dashboards tell replicas apart."""
            return {
                f"{sample['metric']['instance'].rpartition(':')[2]} {sample['metric']['probe']}"
                for sample in prometheus.query("hneurons_probe_info")
            }

        tools.wait_for(lambda: len(shown()) == 2, "both replicas")
        first.process.send_signal(signal.SIGTERM)
        assert first.wait(30) == 0
        port = ("--port", str(first.port))
        stack.enter_context(start_in(tmp_path, *drain, "--probe", str(tmp_path / "new"), *port))
        tools.wait_for(
            lambda: shown() == {f"{first.port} {new.id}", f"{second.port} {old.id}"},
            "two probes side by side",
        )
        # Both are read by clients, and the recording rules keep them apart.
        tools.wait_for(
            lambda: (
                {
                    sample["metric"]["probe"]
                    for sample in prometheus.query("hneurons:token_flagged:ratio_rate5m")
                }
                == {old.id, new.id}
            ),
            "a flagged share of each",
        )
        # How many answers fit into all this is the machine's pace, not what is tested.
        tools.wait_for(
            lambda: all(len(traffic.statuses) >= 4 for traffic in crowd), "answers for everybody"
        )
    statuses = [status for traffic in crowd for status in traffic.statuses]
    assert set(statuses) == {200}
