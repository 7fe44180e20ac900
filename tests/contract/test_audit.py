"""The audit log: what a line says, rotation, and what happens when it cannot be written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from server.audit import AuditError, AuditLog
from server.engines.base import EngineOverloadedError, RequestFailedError
from server.engines.fake import FakeEngine
from server.metrics import Metrics


def audited(path: Path, engine: FakeEngine, **settings: Any) -> dict[str, Any]:
    """Service settings with an audit log at `path`."""
    metrics = Metrics(model_name="fake", health=engine.health)
    options = {"max_bytes": 100_000, "with_text": False, **settings}
    log = AuditLog(path, on_failure=metrics.audit_failed, **options)
    return {"recorders": (log,), "keeps_text": options["with_text"], "metrics": metrics}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_one_line_per_answer_says_who_read_it_and_what_came_of_it(
    open_wire: Any, tmp_path: Path
) -> None:
    """Months later nobody remembers which probe, at which threshold, let an answer pass."""
    engine, path = FakeEngine(), tmp_path / "audit.jsonl"
    async with open_wire(engine, **audited(path, engine)) as wire:
        risk = {"threshold": 0.7, "alpha": 0.5, "policy": "flag"}
        whole = await wire.chat("secret 42", risk=risk, n=2)
        await wire.chunks("secret 42", risk={"policy": "withhold"})
        await wire.chat("secret 42")
        scored = await wire.http.post("/v1/risk", json={"prompt": "a", "text": "secret 42"})
    first, withheld, unmonitored, given = lines(path)
    probe = engine.probes[0]
    assert first["request_id"] == whole.headers["x-request-id"]
    assert first["answer_id"] == whole.json()["id"]
    assert (first["probe"], first["probe_sha256"]) == (probe.id, probe.sha256)
    assert (first["alpha"], first["response_threshold"]) == (0.5, 0.7)
    assert [c["score"] for c in first["choices"]] == [
        c["risk"]["score"] for c in whole.json()["choices"]
    ]
    assert withheld["choices"][0]["finish_reason"] == "content_filter"
    assert withheld["choices"][0]["flagged"] is True
    assert unmonitored["probe"] is None
    assert given["endpoint"] == "risk"
    assert given["choices"][0]["status"] == scored.json()["risk"]["status"] == "scored"
    assert "secret" not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failed_answer_has_a_line_too(open_wire: Any, tmp_path: Path, stream: bool) -> None:
    """Text that left before an error has left: a log of successes alone would deny it."""
    engine, path = FakeEngine(), tmp_path / "audit.jsonl"
    async with open_wire(engine, **audited(path, engine, with_text=True)) as wire:
        await wire.chat("[fail:4]abcdef", risk=True, stream=stream)
    (line,) = lines(path)
    assert line["error"] == "nonfinite_logits"
    assert line["choices"][0]["text"] == "ab"  # the third waits for its reading
    assert line["choices"][0]["status"] is None


@pytest.mark.parametrize("stream", [False, True])
async def test_a_second_attempt_that_the_queue_refuses_is_a_failure_with_a_line(
    open_wire: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """What `retry` had generated was in no log, and the failure in no figure."""
    engine, path = FakeEngine(), tmp_path / "audit.jsonl"
    generate, calls = engine.generate, []

    def once(request: Any) -> Any:
        calls.append(request)
        if len(calls) > 1:
            raise EngineOverloadedError("full")
        return generate(request)

    monkeypatch.setattr(engine, "generate", once)
    async with open_wire(engine, **audited(path, engine)) as wire:
        await wire.chat("in 1969", risk={"policy": "retry"}, stream=stream)
        page = wire.service.metrics.render().decode()
    assert len(calls) == 2
    (line,) = lines(path)
    assert line["error"] == "overloaded"
    assert 'hneurons_failed_requests_total{model_name="fake",reason="overloaded"} 1.0' in page


async def test_every_answer_that_reached_the_model_has_a_line_and_no_other(
    open_wire: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reading that failed was in no log; a chat that the queue refused was in it."""

    def raising(error: Exception) -> Any:
        def raises(*_: object) -> Any:
            raise error

        return raises

    engine, path = FakeEngine(), tmp_path / "audit.jsonl"
    given = {"prompt": "a", "text": "secret 42"}
    async with open_wire(engine, **audited(path, engine)) as wire:
        for method in ("score", "generate"):
            monkeypatch.setattr(FakeEngine, method, raising(EngineOverloadedError("full")))
        assert (await wire.http.post("/v1/risk", json=given)).status_code == 429
        assert (await wire.chat("secret 42")).status_code == 429
        broken = RequestFailedError("nonfinite_logits", "NaN")
        monkeypatch.setattr(FakeEngine, "score", raising(broken))
        assert (await wire.http.post("/v1/risk", json=given)).status_code == 500
    (line,) = lines(path)
    assert (line["endpoint"], line["error"]) == ("risk", "nonfinite_logits")
    assert line["choices"][0]["status"] is None


async def test_text_is_kept_only_on_request(open_wire: Any, tmp_path: Path) -> None:
    """The text is what went out, not what was withheld."""
    engine, path = FakeEngine(), tmp_path / "audit.jsonl"
    async with open_wire(engine, **audited(path, engine, with_text=True)) as wire:
        await wire.chat("plain", risk=True)
        await wire.chat("in 1969", risk={"policy": "withhold"})
    kept, withheld = (line["choices"][0]["text"] for line in lines(path))
    assert kept == "plain"
    assert withheld.startswith("This answer was withheld")


async def test_a_full_file_is_renamed_and_nothing_is_lost(open_wire: Any, tmp_path: Path) -> None:
    """A log that grows without end fills the disk; one that drops its past is no audit."""
    engine, path = FakeEngine(), tmp_path / "audit.jsonl"
    async with open_wire(engine, **audited(path, engine, max_bytes=4096)) as wire:
        for _ in range(20):
            await wire.chat("a", risk=True)
    files = sorted(tmp_path.glob("audit*.jsonl"))
    assert len(files) > 2
    assert all(file.stat().st_size <= 4096 for file in files)
    ids = [line["answer_id"] for file in files for line in lines(file)]
    assert len(set(ids)) == len(ids) == 20


async def test_a_line_that_cannot_be_written_is_counted_and_named(
    open_wire: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers go on without a record; whoever relies on the log must hear of it."""
    engine, path = FakeEngine(), tmp_path / "audit.jsonl"
    full = os.open("/dev/full", os.O_WRONLY)
    settings = audited(path, engine)
    os.dup2(full, settings["recorders"][0]._file)
    os.close(full)
    async with open_wire(engine, **settings) as wire:
        answer = await wire.chat("a", risk=True)
        page = (await wire.http.get("/metrics")).text
    assert answer.status_code == 200
    assert 'hneurons_audit_failures_total{model_name="fake"} 1.0' in page
    (record,) = [r for r in caplog.records if r.message == "audit record lost"]
    assert record.request_id == answer.headers["x-request-id"]
    assert record.error == "No space left on device"


def test_a_log_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    """A server that was told to keep records must not run without; nor through a link."""
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "no" / "audit.jsonl", tmp_path / "link"):
        with pytest.raises(AuditError, match="audit_log: cannot open"):
            AuditLog(path, max_bytes=4096, with_text=False, on_failure=lambda: None)


async def test_a_file_that_was_moved_away_costs_no_record(open_wire: Any, tmp_path: Path) -> None:
    """logrotate, or a rotation that found no free descriptor, left nothing to rename: from then on
    every record was lost."""
    engine, path = FakeEngine(), tmp_path / "audit.jsonl"
    async with open_wire(engine, **audited(path, engine, max_bytes=4096)) as wire:
        await wire.chat("a", risk=True)
        path.rename(tmp_path / "audit-moved.jsonl")
        for _ in range(19):
            await wire.chat("a", risk=True)
        page = (await wire.http.get("/metrics")).text
    assert 'hneurons_audit_failures_total{model_name="fake"} 0.0' in page
    found = [line["answer_id"] for file in tmp_path.glob("*.jsonl") for line in lines(file)]
    assert len(set(found)) == len(found) == 20
    assert path.exists()


async def test_a_line_that_was_cut_leaves_nothing_behind(
    open_wire: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full in the middle of a line would spoil the next one too, uncounted."""
    engine, path = FakeEngine(), tmp_path / "audit.jsonl"
    write = os.write
    async with open_wire(engine, **audited(path, engine)) as wire:
        with monkeypatch.context() as patch:
            patch.setattr("server.audit.os.write", lambda file, line: write(file, line[:50]))
            await wire.chat("a", risk=True)
        await wire.chat("a", risk=True)
        page = (await wire.http.get("/metrics")).text
    assert 'hneurons_audit_failures_total{model_name="fake"} 1.0' in page
    assert len(lines(path)) == 1
