"""A server of our own as a child process, for as long as `with` lasts.

`offline` never imports `server`: it starts it as anybody would and speaks HTTP to it, so a probe is
trained on exactly what production writes. It stands behind a guardian (offline/guardian.py), which
ends it when this process is killed: a server that nobody asks any more would keep its memory.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx

from probes.errors import HNeuronsError

log = logging.getLogger(__name__)

START_SECONDS = 600.0  # a large model loads for minutes


class ChildServerError(HNeuronsError):
    """The server that was started did not come up; the message carries what it said last."""


@contextmanager
def child_server(
    model: str,
    *,
    in_flight: int,
    revision: str | None = None,
    dtype: str = "auto",
    probes: Sequence[str] = ("none",),
) -> Iterator[str]:
    """Serve `model` with `probes` on a free loopback port; yields the base URL."""
    port = _free_port()
    command = [sys.executable, "-m", "server", model, "--port", str(port), "--dtype", dtype]
    command += ["--revision", revision] if revision else []
    command += [word for probe in probes for word in ("--probe", probe)]
    command += ["--max-num-seqs", str(in_flight), "--drain-delay", "0", "--no-playground"]
    with tempfile.TemporaryFile("w+") as output:
        log.info("starting %s", " ".join(command[1:]))
        process = subprocess.Popen(
            [sys.executable, "-m", "offline.guardian", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us alone; we then let go of the pipe
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, url)
            yield url
        except HNeuronsError as exc:
            if process.poll() is None:
                raise
            output.seek(0)
            raise ChildServerError(
                f"the server ended with status {process.returncode} ({exc}); it said: "
                f"{output.read()[-2000:]}"
            ) from exc
        finally:
            assert process.stdin is not None
            process.stdin.close()  # the guardian ends the server, by force if need be
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
            raise ChildServerError("it did not come up")
        try:
            if httpx.get(f"{url}/readyz", timeout=5.0, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise ChildServerError(f"the server was not ready within {START_SECONDS:.0f} s")
