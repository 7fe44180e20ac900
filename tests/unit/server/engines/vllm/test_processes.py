"""What of the server's children belongs to vLLM, and ends with it."""

from __future__ import annotations

import subprocess
import sys
from multiprocessing import resource_tracker
from types import SimpleNamespace
from typing import Any

import psutil

from server.engines.vllm.processes import EngineProcesses


def test_the_engine_ends_and_pythons_tracker_of_shared_memory_stays():
    """Killed with the engine, the tracker left its shared memory behind for good."""
    resource_tracker.ensure_running()
    tracker = psutil.Process(resource_tracker._resource_tracker._pid)  # type: ignore[attr-defined]
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as engine:
        processes = EngineProcesses()
        assert processes.trouble() == ""
        llm: Any = SimpleNamespace(shutdown=lambda timeout: None)
        processes.end(llm)
        assert not psutil.pid_exists(engine.pid)
    assert tracker.is_running()
    assert tracker.status() != psutil.STATUS_ZOMBIE
