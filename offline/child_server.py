"""A server of our own as a child process, for as long as `with` lasts.

`offline` never imports `server`: it starts it as anybody would and speaks HTTP to it, so a probe is
trained on exactly what production writes.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from probes.errors import HNeuronsError

log = logging.getLogger(__name__)

START_SECONDS = 600.0  # a large model loads for minutes
STOP_SECONDS = 40.0


class ChildServerError(HNeuronsError):
    """The server that was started did not come up; the message carries what it said last."""


@contextmanager
def child_server(model: str, *, in_flight: int, probe: str = "none") -> Iterator[str]:
    """Serve `model` on a free loopback port; yields the base URL."""
    port = _free_port()
    command = [sys.executable, "-m", "server", model, "--probe", probe, "--port", str(port)]
    command += ["--max-num-seqs", str(in_flight), "--drain-delay", "0", "--no-playground"]
    with tempfile.TemporaryFile("w+") as output:
        log.info("starting %s", " ".join(command[1:]))
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, url)
            yield url
        except ChildServerError as exc:
            output.seek(0)
            raise ChildServerError(f"{exc}; it said: {output.read()[-2000:]}") from exc
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ChildServerError(f"the server ended with status {process.returncode}")
        try:
            if httpx.get(f"{url}/readyz", timeout=5.0).is_success:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise ChildServerError(f"the server was not ready within {START_SECONDS:.0f} s")
