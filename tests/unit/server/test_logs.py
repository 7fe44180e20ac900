"""The log: JSON lines on stderr, exceptions without their message."""

from __future__ import annotations

import json
import logging

import pytest

from server.logs import configure_logging

pytestmark = pytest.mark.usefixtures("restored_logging")


def test_a_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents: a log injection by a line break, and fields that a collector cannot find."""
    configure_logging("info")
    logging.getLogger("server.x").info("two\nlines", extra={"status": 200})
    line = json.loads(capsys.readouterr().err)
    assert line["message"] == "two\nlines"
    assert (line["level"], line["logger"], line["status"]) == ("INFO", "server.x", 200)
    assert "time" in line


def test_an_exception_is_logged_without_its_message(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents: a library that quotes the prompt in what it raises."""
    configure_logging("info")
    try:
        raise ValueError("canary-prompt")
    except ValueError:
        logging.getLogger("server.x").exception("failed")
    err = capsys.readouterr().err
    assert "canary" not in err
    assert "ValueError" in json.loads(err)["exc_info"]
    assert "test_an_exception_is_logged" in json.loads(err)["exc_info"]


def test_libraries_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents: a line per request of a library, with a URL in it."""
    configure_logging("info")
    logging.getLogger("httpx").info("GET http://x/canary")
    logging.getLogger("uvicorn.error").info("Started")
    assert capsys.readouterr().err == ""
