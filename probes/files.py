"""Bytes in, bytes out: read a small regular file once, write a folder all at once."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from probes.errors import ProbeError, ProbeFormatError

MAX_BYTES = 64 * 2**20

# What executes when loaded. Named so that the refusal can say why.
_EXECUTABLE_SUFFIXES = frozenset(
    {".pkl", ".pickle", ".joblib", ".pt", ".pth", ".bin", ".npy", ".npz"}
)
# A safetensors file may begin with 0x80 too (a header length), but never goes on like a pickle.
_EXECUTABLE_MAGIC = {
    "pickle": re.compile(rb"\x80[\x02-\x05][^\x00]"),
    "torch zip": re.compile(rb"PK\x03\x04"),
    "numpy": re.compile(rb"\x93NUMPY"),
}


def read_regular_file(path: Path) -> bytes:
    """All bytes of `path`, opened once; ProbeFormatError for links, devices, pickles, > 64 MiB."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        reason = "is a symbolic link" if exc.errno == errno.ELOOP else f"({exc.strerror})"
        raise ProbeFormatError(f"cannot read {path} {reason}") from exc
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ProbeFormatError(f"{path} is not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_BYTES:
        raise ProbeFormatError(f"{path} is larger than {MAX_BYTES} bytes: this is not a probe")
    refuse_executable(path, content)
    return content


def refuse_executable(path: Path, content: bytes = b"") -> None:
    """ProbeFormatError when the name or the first bytes are those of a pickle-like format."""
    kind = next((name for name, magic in _EXECUTABLE_MAGIC.items() if magic.match(content)), None)
    if kind is None and path.suffix.lower() in _EXECUTABLE_SUFFIXES:
        kind = path.suffix.lower()
    if kind is not None:
        raise ProbeFormatError(
            f"{path} is a {kind} file, which could run code when loaded; a probe is a folder with "
            f"probe.json and probe.safetensors (python -m offline makes one)"
        )


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Create the folder `path` with `files`, completely or not at all.

    Written beside it, flushed to disk, renamed. An existing `path` is refused: a reader may hold
    it, so every version gets a folder of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        for name, content in files.items():
            with (temporary / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        _sync(temporary)
        try:
            temporary.rename(path)
        except OSError as exc:
            raise ProbeError(f"cannot create {path} ({exc.strerror}); choose a new folder") from exc
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already after the rename


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
