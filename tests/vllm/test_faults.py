"""The server's processes die, stop or do not fit: clients are told, nothing stays, nobody lies.

The demo model over HTTP; SIGTERM is sent in tests/engines. Graphs are traced but not compiled,
which these tests do not need and which takes half a minute each.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil
import pytest

from tests.running import OpenStream, RunningServer, Watch, ending, running_server, wait_until

# A worker of its own, as on CPUs: with one GPU vLLM has none, unless it is told.
TRACED = """--compilation-config '{"backend": "eager"}' --distributed-executor-backend mp"""
QUESTION = "Tell me about the sea."
LONG = {"max_tokens": 1800, "ignore_eos": True, "risk": True}
SECONDS_TO_TELL = 5.0


@pytest.fixture
def temporary(monkeypatch) -> Iterator[Path]:
    """Where processes of a test leave temporary files. A socket's path is 107 bytes at most."""
    with TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def server(tmp_path, temporary, demo_model_path) -> Iterator[RunningServer]:
    words = f"--kv-cache-memory-bytes 512M {TRACED}"
    flags = ("--engine", "vllm", "--vllm-args", words, "--drain-timeout", "1")
    with running_server(tmp_path, "demo", *flags, seconds=600) as running:
        yield running


def starting_server(*, cache: str) -> psutil.Popen:
    """A server that nobody waits for, in a session of its own."""
    words = ["--engine", "vllm", "--vllm-args", f"--kv-cache-memory-bytes {cache} {TRACED}"]
    return psutil.Popen(
        [sys.executable, "-m", "server", "demo", "--port", "0", *words],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes_of(server: RunningServer) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def assert_none_left(processes: list[psutil.Process], *, seconds: float = 10) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        process.kill()
    assert not alive


@pytest.mark.parametrize(
    ("victim", "blow"),
    [
        ("EngineCore", signal.SIGKILL),
        ("Worker", signal.SIGKILL),
        ("EngineCore", signal.SIGSTOP),
        ("Worker", signal.SIGSTOP),
    ],
)
def test_a_process_that_is_lost_ends_streams_and_server(server, temporary, victim, blow):
    """Prevents: clients that wait for ever, a 200 from a server whose engine is gone, orphans."""
    assert sockets_in(temporary)
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
    assert not sockets_in(temporary)


def sockets_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_socket()]


def test_a_killed_server_leaves_no_process_behind(server):
    """An engine without its server holds the device, and nobody can ask it to leave."""
    processes = processes_of(server)
    OpenStream(server, QUESTION, **LONG)
    server.process.kill()
    assert_none_left(processes)


def test_a_server_that_is_killed_while_it_starts_leaves_no_process_behind(demo_model_path):
    """A model can load and compile for minutes: so long its engine would hold the device."""
    server = starting_server(cache="512M")
    wait_until(lambda: has_worker(server), 120)
    time.sleep(5)  # it reads the model now; ready it would be after ten more seconds
    processes = server.children(recursive=True)
    server.kill()
    # A process that still imports vLLM, half a minute on a busy machine, sees it when that is done.
    assert_none_left(processes, seconds=90)
    server.stderr.close()
    server.wait()


def has_worker(server: psutil.Popen) -> bool:
    """Compilers and the like come and go meanwhile."""
    for process in server.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "Worker" in process.name():
                return True
    return False


def test_a_cache_that_does_not_fit_is_refused_with_its_reason(demo_model_path):
    """vLLM's own last word is "see root cause above", in a log that scrolls."""
    process = starting_server(cache="64T")
    _, log = process.communicate(timeout=300)
    assert process.returncode > 0
    (sentence,) = (line for line in log.splitlines() if line.startswith("hneurons: "))
    assert "vLLM did not start" in sentence
    assert "memory" in sentence
    assert "root cause" not in sentence
    assert_none_left([p for p in psutil.process_iter() if session_of(p) == process.pid])


def session_of(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return 0
