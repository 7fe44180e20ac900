"""Probes on a model hub: what its page reads of a card, pushing a folder, fetching a commit.

A hub id is always pinned, `org/name@COMMIT` with 40 hex digits: a branch may hold other weights
tomorrow.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from offline.records import RecordError
from probes.card import ProbeCard
from probes.errors import ProbeError
from probes.probe import Probe

FILES = ("probe.json", "probe.safetensors", "README.md")
TAGS = ["hallucination-detection", "h-neurons", "probe"]
METRICS = ["roc_auc", "average_precision", "brier_score"]

_PINNED = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})")


def front_matter(card: ProbeCard) -> str:
    """The YAML that opens README.md: the hub files the probe under its model by it."""
    sources = card.training.get("sources", "")
    data = ModelCardData(
        base_model=card.model.model_id,
        datasets=sources.split(", ") if sources else None,
        library_name="hneurons",
        license=card.training.get("license"),
        metrics=METRICS,
        tags=TAGS,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload the probe in `folder`; returns `repository@commit`, which loads exactly it.

    The token is that of the hub's own tools (HF_TOKEN, or what its `login` stored). RecordError
    when the hub refuses.
    """
    probe = Probe.load(folder)
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message=f"Probe {probe.id}",
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as exc:
        raise RecordError(f"the hub did not take {repository!r}: {_line(exc)}") from exc
    return f"{repository}@{done.oid}"


def find_probe(word: str) -> Path:
    """A folder, or a pinned hub id, which is downloaded once. ProbeError says what is wrong."""
    pinned = _PINNED.fullmatch(word)
    if pinned is None:
        path = Path(word).expanduser()
        if not path.is_dir():
            raise ProbeError(
                f"{word!r} is no folder, and no hub id with a commit (org/name@40 hex)"
            )
        return path
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
            except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as exc:
                raise ProbeError(f"cannot fetch probe {word!r}: {_line(exc)}") from exc
            fetched.replace(folder)
    return folder


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
