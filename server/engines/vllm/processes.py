"""The processes that vLLM started: who they are, how they are, and their end."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

SERVER_PID = "HN_SERVER_PID"  # of the environment that the engine's process inherits
SECONDS_TO_END = 1.0  # for their own farewell; then they are killed
SECONDS_BETWEEN_LOOKS = 0.5  # at files of the kernel, which takes a tenth of a millisecond each


def end_with_server() -> None:
    """The process of the engine that calls this leaves when the server does, even when that was
    killed, or while this one still loads. Whose process the server is says SERVER_PID."""
    number = int(os.environ[SERVER_PID])

    def watch() -> None:
        try:
            server = psutil.Process(number)
            while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except psutil.NoSuchProcess:
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="server-watch", daemon=True).start()


class EngineProcesses:
    """The engine's process and its workers, as they were when the engine was ready."""

    def __init__(self) -> None:
        children = psutil.Process().children(recursive=True)
        # Python's tracker is no part of the engine: it tidies up shared memory after all others.
        self._processes = [p for p in children if "resource_tracker" not in " ".join(p.cmdline())]
        self._next_look = 0.0

    def trouble(self) -> str:
        """Why the engine cannot work, from the states of its processes; empty when it can.

        Looks at most every SECONDS_BETWEEN_LOOKS, however often it is asked.
        """
        now = time.monotonic()
        if now < self._next_look:
            return ""
        self._next_look = now + SECONDS_BETWEEN_LOOKS
        for process in self._processes:
            try:
                status = process.status()
            except psutil.NoSuchProcess:
                return f"vLLM's process {process.pid} is gone"
            if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return f"vLLM's process {process.pid} died"
            if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                return f"vLLM's process {process.pid} was stopped"
        return ""

    def end(self, llm: AsyncLLM) -> None:
        """Blocks until none is left."""
        llm.shutdown(timeout=SECONDS_TO_END)
        for process in self._processes:
            if process.is_running():
                process.kill()
        psutil.wait_procs(self._processes, timeout=SECONDS_TO_END)
