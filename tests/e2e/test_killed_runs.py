"""A run that is killed again and again ends with the same bytes as one that is left alone.

About 60 s of one core, minutes of a busy machine. One process imports everything once and forks
for each attempt, as the imports would take longer than the work.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offline.child_server import child_server

KILLS = 20
SECONDS = 240.0  # of one attempt, at most

ZYGOTE = """
import os, sys
import torch, transformers, sklearn.linear_model
import offline.__main__ as command
import offline.collect, offline.label, offline.extract, offline.fit, offline.evaluate
import offline.publish, offline.metrics
offline.metrics.RESAMPLES = 20  # the intervals are not what is tested here
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        sys.argv = ["offline", *line.rstrip("\\n").split("\\t")]
        os.dup2(log, 1), os.dup2(log, 2)
        os.close(0)
        command.main()
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Zygote:
    """Runs `python -m offline ...` again and again in forks of one warm process."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE, str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._line() == "ready"

    def run(self, *arguments: str, until: Callable[[], bool] = lambda: False) -> int:
        """Run to the end, or kill as soon as `until` holds; the wait status."""
        assert self._process.stdin is not None
        self._process.stdin.write("\t".join(arguments) + "\n")
        self._process.stdin.flush()
        pid = int(self._line())
        deadline = time.monotonic() + SECONDS
        while Path(f"/proc/{pid}/cmdline").read_bytes():  # empty once it has ended
            if until() or time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        return int(self._line())

    def close(self) -> None:
        self._process.communicate(timeout=30)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("zygote") / "log")
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[str]:
    with child_server(str(tiny_model), in_flight=8) as url:
        yield url


@pytest.mark.timeout(900)
def test_twenty_kills_leave_no_trace(
    zygote: Zygote,
    server: str,
    tiny_model: Path,
    questions: tuple[Path, Path],
    statements: Path,
    given: Path,
    tmp_path: Path,
) -> None:
    """Power cuts, preemption, a full disk: whatever ends a run, nothing is lost, asked twice or
    different afterwards, to the last byte of the probe."""
    chance = random.Random(0)
    facts, prompts = questions

    def train(out: Path, until: Callable[[], bool] = lambda: False) -> int:
        return zygote.run(
            *("train", str(tiny_model), "--out", str(out), "--name", "tiny"),
            *("--questions", f"{facts}:complete", "--questions", f"{prompts}:ordinary"),
            *("--given", f"{given}:refchecker", "--best-of", "2"),
            *("--questions", f"{statements}:complete", "--told", "--more-samples", "2"),
            *("--base-url", server),
            *("--solver", "liblinear", "--in-flight", "8"),
            until=until,
        )

    whole, killed = tmp_path / "whole" / "tiny", tmp_path / "killed" / "tiny"
    assert train(whole) == 0, zygote.log.read_text()[-2000:]
    after_collect = time.time() - (whole / "answers.jsonl").stat().st_mtime

    kills = attempts = 0
    answers = killed / "answers.jsonl"
    while kills < KILLS:
        attempts += 1
        assert attempts < 3 * KILLS
        if kills < 8:
            wanted = _lines(answers) + chance.randrange(1, 25)
            status = train(killed, lambda: _lines(answers) >= wanted)  # noqa: B023
        else:
            end = time.monotonic() + chance.uniform(0.05, 1.2 * after_collect)
            status = train(killed, lambda: time.monotonic() > end)  # noqa: B023
        kills += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or status == 0, zygote.log.read_text()[-2000:]
    assert train(killed) == 0, zygote.log.read_text()[-2000:]
    assert _digests(killed) == _digests(whole)


def test_a_killed_collector_takes_its_own_server_with_it(
    zygote: Zygote, tiny_model: Path, questions: tuple[Path, Path], tmp_path: Path
) -> None:
    """The server is a child that the kill does not reach; it must notice."""
    before = _serving(tiny_model)
    answers = tmp_path / "run" / "answers.jsonl"
    status = zygote.run(
        *("collect", str(tiny_model), "--out", str(answers.parent)),
        *("--questions", f"{questions[0]}:complete"),
        until=lambda: _lines(answers) > 3,
    )
    assert os.WIFSIGNALED(status), zygote.log.read_text()[-2000:]
    deadline = time.monotonic() + 30
    while _serving(tiny_model) - before:
        assert time.monotonic() < deadline, "a server outlived its collector"
        time.sleep(0.05)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _digests(run: Path) -> dict[str, str]:
    """Every file of a run that is not hidden."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(run).parts)
    }


def _serving(model: Path) -> set[int]:
    """Processes that serve `model`."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # ended meanwhile
            if b"server" in words and str(model).encode() in words:
                found.add(int(folder.name))
    return found
