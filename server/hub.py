"""Probes on a model hub: a pinned id becomes a folder, before the listener exists."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from probes.errors import ProbeError

FILES = ("probe.json", "probe.safetensors", "README.md")

_PINNED = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})")


def is_pinned(word: str) -> bool:
    """Whether `word` is `org/name@COMMIT` with 40 hex digits."""
    return _PINNED.fullmatch(word) is not None


def fetch_probe(word: str) -> Path:
    """Folder of a probe that `is_pinned`, downloaded once: a commit never changes.

    ProbeError when the hub does not have it or cannot be reached.
    """
    pinned = _PINNED.fullmatch(word)
    if pinned is None:
        raise ValueError(f"{word!r} is not org/name@COMMIT")
    repository, commit = pinned["repository"], pinned["commit"]
    folder = Path(constants.HF_HOME, "hneurons", repository.replace("/", "--"), commit)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            # Into plain files: a probe is not read through the links of the hub's cache.
            fetched = Path(temporary, "probe")
            try:
                snapshot_download(
                    repository, revision=commit, local_dir=fetched, allow_patterns=list(FILES)
                )
            except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
                reason = " ".join(str(error).split())[:300]
                raise ProbeError(f"cannot fetch probe {word!r}: {reason}") from error
            fetched.replace(folder)
    return folder
