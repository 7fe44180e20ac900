"""A real server process with the fake engine, and raw sockets to talk to it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

SECONDS_TO_START = 180  # importing torch takes seconds alone, a minute beside other tests
USER = {"role": "user", "content": "hi 42"}


@dataclass
class RunningServer:
    """A child process; `log` is its stderr."""

    process: subprocess.Popen[str]
    port: int
    log: Path
    ready_line: str
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def chat(self, content: str = "hi 42", **body: object) -> httpx.Response:
        document = {"model": "m", "messages": [{"role": "user", "content": content}], **body}
        return self.client.post("/v1/chat/completions", json=document)

    @contextmanager
    def stream(self, content: str, **body: object) -> Iterator[Iterator[str]]:
        """Lines of a streamed chat; the first one has come when this begins."""
        document = {"model": "m", "messages": [{"role": "user", "content": content}]}
        document |= {"stream": True, **body}
        with self.client.stream("POST", "/v1/chat/completions", json=document) as response:
            assert response.status_code == 200, response.read()
            lines = (line for line in response.iter_lines() if line)
            first = next(lines)
            yield _chain(first, lines)

    def raw(self, data: bytes = b"", *, seconds: float = 30) -> socket.socket:
        """A socket that has sent `data` and nothing else."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=seconds)
        if data:
            sock.sendall(data)
        return sock

    def metric(self, name: str) -> float:
        """Sum over the labels of one sample name on the metrics page."""
        page = self.client.get("/metrics").text
        found = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
        return sum(map(float, found))

    def memory_mib(self) -> float:
        """Resident memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) / 1024

    def wait(self, seconds: float) -> int:
        """The exit code; TimeoutExpired when the process is still there."""
        return self.process.wait(seconds)

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


StartServer = Callable[..., AbstractContextManager[RunningServer]]


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def answer_of(sock: socket.socket) -> bytes:
    """Everything until the server closes; a reset is an answer too."""
    parts = []
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while part := sock.recv(65_536):
            parts.append(part)
    return b"".join(parts)


@contextmanager
def _start(
    folder: Path, *flags: str, environment: dict[str, str] | None = None
) -> Iterator[RunningServer]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HNEURONS_")}
    log = folder / f"server-{time.monotonic_ns()}.log"
    command = [
        sys.executable,
        "-m",
        "server",
        "m",
        "--engine",
        "fake",
        "--port",
        "0",
        "--drain-delay",
        "0",
    ]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**inherited, "OMP_NUM_THREADS": "1", **(environment or {})},
        )
    watchdog = _KillAfter(process, SECONDS_TO_START)
    with watchdog:
        assert process.stdout
        ready_line = process.stdout.readline()
    found = re.search(r"curl https?://[^/]*:(\d+)", ready_line)
    assert found, f"the server did not become ready: {log.read_text()}"
    server = RunningServer(process, int(found[1]), log, ready_line)
    try:
        yield server
    finally:
        server.close()


class _KillAfter:
    """Kills a process that does not leave the block in time, so that reading it ends."""

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self._timer = threading.Timer(seconds, process.kill)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


@pytest.fixture
def start_server(tmp_path: Path) -> StartServer:
    """Starts a server of the test's own: `with start_server("--flag") as server`."""
    return lambda *flags, **options: _start(tmp_path, *flags, **options)


@pytest.fixture(scope="session")
def start_in() -> StartServer:
    """Like `start_server`, for fixtures of a wider scope: the first argument is a folder."""
    return _start


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One open server that hostile tests share; it must survive all of them."""
    with _start(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def answer() -> Callable[[socket.socket], bytes]:
    return answer_of
