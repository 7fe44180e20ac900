"""R40: what clients send shows up nowhere, and adds no series, however much of it there is."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.answer_record import AnswerRecord
from server.audit import AuditLog
from server.engines.fake import FakeEngine
from server.logs import configure_logging
from server.tracing import _event_attributes, _span_attributes

NAMES = 10_000
CANARY = "CANARY-7f3a"


def series(page: str) -> int:
    return sum(len(family.samples) for family in text_string_to_metric_families(page))


async def test_ten_thousand_made_up_names_add_no_series(open_wire: Any) -> None:
    """A label that a client chooses fills Prometheus' memory from outside."""
    async with open_wire() as wire:
        before = series((await wire.http.get("/metrics")).text)

        async def ask(i: int) -> int:
            name = secrets.token_hex(8)
            body = {"model": name, "messages": [], "user": name, "risk": {"probe": name}}
            kinds = (
                ("POST", "/v1/chat/completions", body),
                ("POST", f"/v1/{name}", body),
                ("GET", f"/v1/models/{name}", None),
                ("POST", "/v1/risk", {"model": name, "text": name, "prompt": name}),
            )
            method, path, content = kinds[i % len(kinds)]
            headers = {"x-request-id": name, "user-agent": name, "authorization": f"Bearer {name}"}
            response = await wire.http.request(method, path, json=content, headers=headers)
            return int(response.status_code)

        for start in range(0, NAMES, 100):
            statuses = await asyncio.gather(*(ask(start + i) for i in range(100)))
            assert set(statuses) <= {400, 404}
        after = series((await wire.http.get("/metrics")).text)
    assert after - before <= 4  # the refusals, by their own words
    assert after < 500


class Kept:
    """A recorder that keeps what `Tracing` would send."""

    def __init__(self) -> None:
        self.spans: list[str] = []

    def record(self, answer: AnswerRecord) -> None:
        self.spans.append(repr(_span_attributes(answer, "chat")))
        self.spans += [repr(_event_attributes(answer, choice)) for choice in answer.choices]

    def close(self) -> None:
        pass


async def test_a_canary_leaves_no_trace(
    open_wire: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Prompts, answers and keys belong to the client: not to logs, metrics, traces or errors."""
    configure_logging("debug")
    try:
        engine, path, kept = FakeEngine(), tmp_path / "audit.jsonl", Kept()
        audit = AuditLog(path, max_bytes=10**6, with_text=False, on_failure=lambda: None)
        errors = []
        async with open_wire(engine, recorders=(audit, kept)) as wire:
            wire.http.headers["authorization"] = f"Bearer {CANARY}"
            text = f"{CANARY} 1969"
            await wire.chat(text, risk=True)
            await wire.chunks(text, risk={"policy": "withhold"}, user=CANARY)
            await wire.http.post("/v1/risk", json={"prompt": CANARY, "text": text})
            for fields in (
                {"model": CANARY},
                {"temperature": CANARY},
                {"risk": {"probe": CANARY}},
                {"risk": {"alpha": CANARY}},
                {"tools": [CANARY]},
                {"stop": [CANARY] * 9},
            ):
                errors.append((await wire.chat(text, **fields)).text)
            errors.append((await wire.chat(f"[fail:2]{text}", risk=True)).text)
            errors.append((await wire.http.get(f"/{CANARY}?{CANARY}={CANARY}")).text)
            errors.append((await wire.http.post("/v1/risk", content=CANARY)).text)
            page = (await wire.http.get("/metrics")).text
    finally:
        logging.basicConfig(level=logging.WARNING, force=True)
        for name in ("server", "probes"):
            logging.getLogger(name).setLevel(logging.NOTSET)
    log = capfd.readouterr().err
    assert len([json.loads(line) for line in log.splitlines()]) >= 12
    assert len(kept.spans) >= 8
    assert all('"error"' in error for error in errors)
    for where in (log, page, path.read_text(), *kept.spans, *errors):
        assert CANARY not in where
