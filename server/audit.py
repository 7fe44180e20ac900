"""The audit log: one JSON line per answer, appended, never changed and never deleted here.

A full file is renamed to `NAME-<UTC time>.jsonl` and a new one is begun. What a line says: which
probe (by digest) read the answer at which alpha and threshold, and what came of it. No text unless
the operator asks for it. When a line cannot be written the answer goes out all the same; the loss
is counted and logged by request id.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from probes.errors import HNeuronsError
from server.answer_record import AnswerRecord, ChoiceRecord

_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC

log = logging.getLogger(__name__)


class AuditError(HNeuronsError):
    """The audit log cannot be opened."""


class AuditLog:
    """A `Recorder` that appends to `path`; AuditError when it cannot be opened."""

    def __init__(
        self, path: Path, *, max_bytes: int, with_text: bool, on_failure: Callable[[], None]
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._with_text = with_text
        self._on_failure = on_failure
        try:
            self._file = os.open(path, _FLAGS, 0o600)
        except OSError as error:
            raise AuditError(f"audit_log: cannot open {str(path)!r}: {error.strerror}") from error

    def record(self, answer: AnswerRecord) -> None:
        line = orjson.dumps(_document(answer, with_text=self._with_text)) + b"\n"
        try:
            if os.fstat(self._file).st_size + len(line) > self._max_bytes:
                self._rotate()
            size = os.fstat(self._file).st_size
            if os.write(self._file, line) < len(line):
                os.ftruncate(self._file, size)  # half a line would spoil the next one as well
                raise OSError(None, "the line was cut")
        except OSError as error:
            self._on_failure()
            log.error(
                "audit record lost",
                extra={"request_id": answer.request_id, "error": error.strerror},
            )

    def close(self) -> None:
        os.close(self._file)

    def _rotate(self) -> None:
        if os.fstat(self._file).st_size == 0:
            return  # one line is longer than a file may be: it gets a file of its own
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        with suppress(FileNotFoundError):  # somebody else's rotation was quicker
            self._path.rename(self._path.with_name(f"{self._path.stem}-{stamp}{self._path.suffix}"))
        full, self._file = self._file, os.open(self._path, _FLAGS, 0o600)
        os.close(full)


def _document(answer: AnswerRecord, *, with_text: bool) -> dict[str, Any]:
    plan = answer.plan
    return {
        "time": datetime.datetime.fromtimestamp(answer.ended, datetime.UTC).isoformat(),
        "request_id": answer.request_id,
        "answer_id": answer.answer_id,
        "endpoint": answer.endpoint,
        "model": answer.model,
        "probe": plan.probe.id if plan else None,
        "probe_sha256": plan.probe.sha256 if plan else None,
        "alpha": plan.alpha if plan else None,
        "policy": plan.policy if plan else None,
        "token_threshold": plan.token_threshold if plan else None,
        "response_threshold": plan.response_threshold if plan else None,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "seconds": round(answer.seconds, 4),
        "error": answer.error,
        "choices": [_choice(choice, with_text=with_text) for choice in answer.choices],
    }


def _choice(choice: ChoiceRecord, *, with_text: bool) -> dict[str, Any]:
    risk = choice.risk
    document: dict[str, Any] = {
        "finish_reason": choice.finish_reason,
        "status": risk.status if risk else None,
        "reason": risk.reason if risk else None,
        "score": risk.score if risk else None,
        "flagged": risk.is_flagged if risk else None,
        "flagged_spans": len(risk.spans) if risk else None,
        "alphas": [attempt.alpha for attempt in risk.attempts] if risk and risk.attempts else None,
    }
    if with_text:
        document["text"] = choice.text
    return document
