"""A run folder belongs to one process at a time.

Two collectors would ask every question twice and interleave their lines. The lock is the kernel's:
it ends with the process, however that ends, so a killed run leaves nothing to clear away.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import ParamSpec

from filelock import FileLock, Timeout

from offline.records import RecordError

LOCK = ".lock"
P = ParamSpec("P")


@contextmanager
def locked(out: Path, name: str = LOCK) -> Iterator[None]:
    """Hold `out` alone; RecordError when another process does. A holder may hold it again.

    Processes that share the work on a folder each hold a `name` of their own.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / name, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as exc:
        raise RecordError(
            f"another process is at work in {out}; wait until it ends or choose another --out"
        ) from exc
    try:
        yield
    finally:
        lock.release()


def holds_run(verb: Callable[P, None]) -> Callable[P, None]:
    """A verb of the command line that holds its `out` folder while it works."""

    @wraps(verb)
    def held(*args: P.args, **kwargs: P.kwargs) -> None:
        out = inspect.signature(verb).bind(*args, **kwargs).arguments["out"]
        with locked(out):
            verb(*args, **kwargs)

    return held
