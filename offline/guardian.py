"""`python -m offline.guardian COMMAND...`: a child that does not outlive whoever started it.

It runs the command and holds the reading end of a pipe on its stdin. The pipe closes when the
starter lets go of it or dies, by whatever signal, and then the command is ended too. Imports
nothing of the project, so that it starts at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

STOP_SECONDS = 40.0  # between a polite and a final signal


def main() -> int:
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_starter, args=(process,), daemon=True).start()
    return process.wait()


def _end_with_starter(process: subprocess.Popen[bytes]) -> None:
    os.read(0, 1)  # nothing is ever written: this returns when the pipe closes
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


if __name__ == "__main__":
    sys.exit(main())
