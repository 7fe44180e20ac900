"""Structured logs: one JSON object per line on stderr, never a prompt, a completion or a key.

Exceptions are logged as their type and the places they passed, without their message: a library's
message may quote the input.
"""

from __future__ import annotations

import logging
import sys
import traceback
from types import TracebackType

from pythonjsonlogger.json import JsonFormatter

ExceptionInfo = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)
OUR_LOGGERS = ("server", "probes")


def configure_logging(level: str) -> None:
    """Send every logger to stderr as JSON; `level` for our own, warnings for all others."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _Formatter(
            "%(levelname)s %(name)s %(message)s",
            timestamp="time",
            rename_fields={"levelname": "level", "name": "logger"},
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(level.upper())


class _Formatter(JsonFormatter):
    def formatException(self, ei: ExceptionInfo) -> str:
        kind, _, trace = ei
        places = (
            f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_tb(trace)
        )
        return " < ".join([kind.__qualname__ if kind else "none", *reversed(list(places))])
