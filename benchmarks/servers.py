"""A server under measurement: a process of its own, awaited, and ended with all that it started."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import psutil

SECONDS_TO_START, SECONDS_TO_END = 1200, 20


@contextmanager
def running(
    command: Sequence[str], port: int, *, environment: Mapping[str, str]
) -> Iterator[psutil.Process]:
    """The server's process, once it answers on `port`; SystemExit when it never does."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, **environment}
    )
    server = psutil.Process(process.pid)
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not _answers(f"http://127.0.0.1:{port}/v1/models"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"did not start: {' '.join(command)}")
            time.sleep(0.5)
        yield server
    finally:
        family = [server, *server.children(recursive=True)] if server.is_running() else []
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=SECONDS_TO_END)
        for left in alive:
            left.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
