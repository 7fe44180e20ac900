"""`python -m server MODEL`, also `hneurons-serve`: settings in, exit code out.

0 stopped as asked, 1 refused to start or forced to stop, 2 wrong usage, 3 a probe does not fit,
4 the engine died or hung.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import version

from probes.errors import HNeuronsError, ProbeError
from server.logs import configure_logging
from server.settings import read_settings

EXIT_REFUSED = 1
EXIT_PROBE = 3
SECONDS_FOR_THREADS = 1.0


def main() -> None:
    """The console script."""
    code = run(sys.argv[1:])
    # A thread that hangs in a forward pass must not hold the process.
    timer = threading.Timer(SECONDS_FOR_THREADS, os._exit, args=(code,))
    timer.daemon = True
    timer.start()
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Serve until told to stop; the exit code."""
    if "--version" in arguments:
        print(version("hneurons"))
        return 0
    try:
        settings = read_settings(arguments)
        configure_logging(settings.log_level)
        from server.process import handling_signals

        with handling_signals():
            from server.serve import serve  # torch: seconds that --help and a typo need not wait

            return serve(settings, announce=lambda line: print(line, flush=True))
    except HNeuronsError as error:
        print(f"hneurons: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_PROBE if isinstance(error, ProbeError) else EXIT_REFUSED


if __name__ == "__main__":
    main()
