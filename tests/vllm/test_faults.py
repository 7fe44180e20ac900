"""The server's processes die, stop or do not fit: clients are told, nothing stays, nobody lies.

The demo model over HTTP. Graphs are traced but not compiled, which these tests do not need and
which takes half a minute each.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.running import OpenStream, RunningServer, ending, running_server, wait_until

TRACED = """--compilation-config '{"backend": "eager"}'"""
QUESTION = "Tell me about the sea."
LONG = {"max_tokens": 1800, "ignore_eos": True, "risk": True}
SECONDS_TO_TELL = 5.0


@pytest.fixture
def server(tmp_path, demo_model_path) -> Iterator[RunningServer]:
    words = f"--kv-cache-memory-bytes 512M {TRACED}"
    flags = ("--engine", "vllm", "--vllm-args", words, "--drain-timeout", "1")
    with running_server(tmp_path, "demo", *flags, seconds=600) as running:
        yield running


def processes_of(server: RunningServer) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def assert_none_left(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


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


@pytest.mark.parametrize(
    ("victim", "blow"),
    [("EngineCore", signal.SIGKILL), ("Worker", signal.SIGKILL), ("EngineCore", signal.SIGSTOP)],
)
def test_a_process_that_is_lost_ends_streams_and_server(server, victim, blow):
    """Prevents: clients that wait for ever, a 200 from a server whose engine is gone, orphans."""
    processes = processes_of(server)
    (struck,) = [p for p in processes if victim in " ".join(p.cmdline())]
    streams = [OpenStream(server, QUESTION, **LONG) for _ in range(8)]
    whole: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: whole.append(server.chat(QUESTION, **LONG)))
    waiting.start()
    wait_until(lambda: server.metric("hneurons_requests_running") == 9)
    watch = Watch(server)
    started = time.monotonic()
    struck.send_signal(blow)
    assert [ending(stream.finished()) for stream in streams] == ["engine_dead"] * 8
    waiting.join(SECONDS_TO_TELL)
    assert time.monotonic() - started < SECONDS_TO_TELL
    assert whole[0].status_code == 503
    assert whole[0].json()["error"]["code"] == "engine_dead"
    assert watch.over()[-1] == 503
    assert server.wait(20) == 4
    assert_none_left(processes)


def test_sigterm_under_load_ends_every_stream(server):
    """Prevents: F15 with more processes than one, each of which hears a signal of its own."""
    processes = processes_of(server)
    streams = [OpenStream(server, QUESTION, **LONG) for _ in range(16)]
    watch = Watch(server)
    server.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert [ending(stream.finished()) for stream in streams] == ["shutdown"] * 16
    assert time.monotonic() - started < 1 + SECONDS_TO_TELL  # the drain timeout
    assert 503 in watch.over()
    assert server.wait(20) == 0
    assert_none_left(processes)
