"""A run folder belongs to one process at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from offline.records import RecordError
from offline.run_folder import holds_run, locked

HOLD = """
import sys, time
from pathlib import Path
from offline.run_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_in_use_is_refused_and_free_again_when_its_process_is_killed(
    tmp_path: Path,
) -> None:
    """Two collectors in one folder ask everything twice; a lock file that survives a kill would
    have to be removed by hand."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RecordError, match="another process is at work in"), locked(tmp_path):
        pytest.fail("two processes hold one folder")
    process.kill()
    process.communicate()
    with locked(tmp_path):
        pass


def test_a_verb_that_calls_verbs_holds_the_folder_throughout(tmp_path: Path) -> None:
    """`train` holds what each of its verbs holds too."""
    seen: list[Path] = []

    @holds_run
    def inner(out: Path) -> None:
        seen.append(out)

    @holds_run
    def outer(model: str, out: Path) -> None:
        inner(out)
        inner(out=out)

    outer("m", tmp_path / "new")
    assert seen == [tmp_path / "new"] * 2
