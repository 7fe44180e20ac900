"""A real server process, and clients of it: for every suite that needs one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

SECONDS_TO_START = 180  # importing torch takes seconds alone, a minute beside other tests
PATIENCE = 20.0  # for what takes a second on an idle machine


@dataclass
class RunningServer:
    """A child process; `log` is its stderr."""

    process: subprocess.Popen[str]
    port: int
    log: Path
    ready_line: str
    model: str
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.address, timeout=60)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def chat(self, content: str = "hi 42", **body: object) -> httpx.Response:
        document = {"model": self.model, "messages": [_said(content)], **body}
        return self.client.post("/v1/chat/completions", json=document)

    @contextmanager
    def stream(self, content: str, **body: object) -> Iterator[Iterator[str]]:
        """Lines of a streamed chat; the first one has come when this begins."""
        document = {"model": self.model, "messages": [_said(content)], "stream": True, **body}
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

    def chat_bytes(self, content: str, **body: object) -> bytes:
        """A chat as it goes over a socket, for clients that leave or do not read."""
        payload = json.dumps({"model": self.model, "messages": [_said(content)], **body})
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        return f"{head}content-length: {len(payload)}\r\n\r\n{payload}".encode()

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


def _said(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


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
def running_server(
    folder: Path,
    model: str,
    *flags: str,
    environment: dict[str, str] | None = None,
    seconds: float = SECONDS_TO_START,
) -> Iterator[RunningServer]:
    """`python -m server MODEL FLAGS` on a free port, ready; its log goes into `folder`."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name == "HNEURONS_CACHE" or not name.startswith("HNEURONS_")
        if name not in ("VLLM_RPC_BASE_PATH", "VLLM_CPU_OMP_THREADS_BIND")  # of engines in tests
    }
    log = folder / f"server-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "server", model, "--port", "0", "--drain-delay", "0"]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            # One thread: two collapse when other tests run beside them.
            env={**inherited, "OMP_NUM_THREADS": "1", **(environment or {})},
        )
    watchdog = _KillAfter(process, seconds)
    with watchdog:
        assert process.stdout
        ready_line = process.stdout.readline()
    found = re.search(r"curl https?://[^/]*:(\d+)", ready_line)
    assert found, f"the server did not become ready: {log.read_text()}"
    server = RunningServer(process, int(found[1]), log, ready_line, model)
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


def events(lines: Iterator[str]) -> list[Any]:
    """Parsed events of a stream to its end; `[DONE]` as that word."""
    found = []
    for line in lines:
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


def ending(stream: list[Any]) -> str:
    """The finish reason or the error code of a stream; fails when it has none, or both."""
    assert stream[-1] == "[DONE]"
    chunks = stream[:-1]
    errors = [chunk["error"]["code"] for chunk in chunks if "error" in chunk]
    reasons = [
        choice["finish_reason"]
        for chunk in chunks
        for choice in chunk.get("choices", [])
        if choice["finish_reason"] is not None
    ]
    assert len(errors) + len(reasons) == 1, (errors, reasons)
    return str((errors + reasons)[0])


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> float:
    """Seconds until `condition` held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - started


class OpenStream:
    """A streamed chat that a thread reads to its end."""

    def __init__(self, server: Any, content: str, **body: object) -> None:
        self.events: list[Any] = []
        self.error: Exception | None = None
        self._has_begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(server, content, body))
        self._thread.start()
        assert self._has_begun.wait(PATIENCE)

    def _read(self, server: Any, content: str, body: dict[str, object]) -> None:
        try:
            with server.stream(content, **body) as lines:
                self._has_begun.set()
                self.events = events(lines)
        except httpx.HTTPError as error:
            self.error = error

    def finished(self) -> list[Any]:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the stream never ended"
        assert self.error is None, self.error
        return self.events


class Watch:
    """What `/readyz` says over a connection that is kept open, until there is none."""

    def __init__(self, server: RunningServer) -> None:
        self.said: list[int] = []
        self._thread = threading.Thread(target=self._look, args=(server.port,))
        self._thread.start()
        wait_until(lambda: self.said == [200] * len(self.said) != [])

    def _look(self, port: int) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            try:
                while True:
                    self.said.append(client.get("/readyz").status_code)
                    time.sleep(0.02)
            except httpx.HTTPError:
                return

    def over(self) -> list[int]:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.said
