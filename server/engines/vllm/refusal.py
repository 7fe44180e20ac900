"""Why a worker did not start. vLLM tells its parent only that one did not; its log says why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from probes.errors import ModelError

VARIABLE = "HN_REFUSAL_FILE"  # of the environment that workers inherit


@contextmanager
def leaving_why() -> Iterator[None]:
    """In a worker: what ends the block is left for the server, which waits for it to start."""
    try:
        yield
    except Exception as error:
        path = Path(os.environ.get(VARIABLE, ""))
        if path.parent.is_dir() and not path.exists():
            path.write_text(" ".join(str(error).split()) or type(error).__name__)
        raise


@contextmanager
def hearing_why() -> Iterator[None]:
    """In the server, around the start: ModelError with what a worker has left."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "why"
        os.environ[VARIABLE] = str(path)
        try:
            yield
        except RuntimeError as error:
            if path.exists():
                raise ModelError(f"vLLM did not start: {path.read_text()}") from error
            raise
        finally:
            del os.environ[VARIABLE]
