"""Probes on a model hub: what its page reads of a card, and pushing a folder.

What comes back is a pinned id, `org/name@COMMIT`: a branch may hold other weights tomorrow.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from offline.records import RecordError
from probes.card import ProbeCard
from probes.probe import Probe

FILES = ("probe.json", "probe.safetensors", "README.md")
TAGS = ["hallucination-detection", "h-neurons", "probe"]
METRICS = ["roc_auc", "average_precision", "brier_score"]


def front_matter(card: ProbeCard) -> str:
    """The YAML that opens README.md: the hub files the probe under its model by it. Only names
    that are the hub's: of a folder's name it would make a link to somebody else's model."""
    model = card.training.get("base_model") or card.model.model_id
    datasets = card.training.get("datasets")
    data = ModelCardData(
        base_model=model if "/" in model else None,
        datasets=datasets.split(", ") if datasets else None,
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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
