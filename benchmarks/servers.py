"""A server under measurement: a process of its own, awaited, and ended with all that it started."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import httpx
import psutil

SECONDS_TO_START, SECONDS_TO_END = 1200, 20


@contextmanager
def running(
    command: Sequence[str], port: int, *, environment: Mapping[str, str]
) -> Iterator[psutil.Process]:
    """The server's process, once it answers on `port`; SystemExit when it never does."""
    url = f"http://127.0.0.1:{port}/v1/models"
    if _answers(url):
        raise SystemExit(f"something else answers on port {port}; choose another one or end it")
    server = psutil.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, **environment})
    family: set[psutil.Process] = {server}
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not _answers(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"did not start: {' '.join(command)}")
            time.sleep(0.5)
        family.update(server.children(recursive=True))
        yield server
    finally:
        with suppress(psutil.NoSuchProcess):  # it has ended by itself
            family.update(server.children(recursive=True))
            server.terminate()
        _, alive = psutil.wait_procs(family, timeout=SECONDS_TO_END)
        for left in alive:
            left.kill()
        psutil.wait_procs(alive)


def _answers(url: str) -> bool:
    try:
        return bool(httpx.get(url, timeout=2, trust_env=False).is_success)
    except httpx.HTTPError:
        return False
