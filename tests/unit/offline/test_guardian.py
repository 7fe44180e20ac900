"""A child server does not outlive the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHILD = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + CHILD
STARTER = """
import subprocess, sys, time
guarded = [sys.executable, "-m", "offline.guardian", sys.executable, "-c", sys.argv[1]]
process = subprocess.Popen(guarded, stdin=subprocess.PIPE)
time.sleep(600)
"""


def _gone(pid: int, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_ends_when_its_starter_is_killed(number: signal.Signals) -> None:
    """`finally` does not run in a killed process: servers used to stay, a gigabyte each."""
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, CHILD], stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    child = int(starter.stdout.readline())
    starter.send_signal(number)
    starter.wait()
    try:
        assert _gone(child)
    finally:
        starter.stdout.close()
        if Path(f"/proc/{child}").exists():
            os.kill(child, signal.SIGKILL)


def test_a_child_that_is_deaf_to_the_polite_signal_is_ended_by_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = "import sys; from offline import guardian as g; g.STOP_SECONDS = 0.2; sys.exit(g.main())"
    guardian = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, "-c", DEAF],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert guardian.stdin is not None
    assert guardian.stdout is not None
    child = int(guardian.stdout.readline())
    guardian.stdin.close()
    assert guardian.wait(20) != 0
    assert _gone(child)
    guardian.stdout.close()


def test_the_childs_own_end_is_passed_on() -> None:
    """A server that dies at start is not waited for."""
    command = [
        sys.executable,
        "-m",
        "offline.guardian",
        sys.executable,
        "-c",
        "raise SystemExit(7)",
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.wait(20) == 7
    assert process.stdin is not None
    process.stdin.close()
