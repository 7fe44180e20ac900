"""What alpha costs a model in reading: the perplexity of fixed prose that it did not write.

Read through the `probes.tap.Meter` that serves, so suppressed exactly as served; no server tells
the log-probability of a given text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from tqdm import tqdm

from offline.models import LoadedModel
from offline.records import Appender, Header, Record, RecordError, read_bytes, read_records
from probes.neurons import find_ffns
from probes.probe import Probe
from probes.tap import Meter


class Prose(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One paragraph of ordinary text."""

    id: str
    text: str


class Surprise(Record, frozen=True, kw_only=True):
    """Mean nats per token of each paragraph, read under one alpha on one set of neurons."""

    id: str  # "<neurons>/<alpha>"
    neurons: str
    alpha: float
    nats: tuple[float, ...]


def read_prose(path: Path) -> list[Prose]:
    """RecordError when a line is no paragraph."""
    lines = [line for line in read_bytes(path).split(b"\n") if line.strip()]
    try:
        return [msgspec.json.decode(line, type=Prose) for line in lines]
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RecordError(f"{path}: {exc}") from exc


def measure(
    loaded: LoadedModel,
    texts: Sequence[Sequence[int]],
    probes: Mapping[str, Probe],
    conditions: Sequence[tuple[str, float]],
    *,
    path: Path,
    header: Header,
) -> None:
    """Append a `Surprise` to `path` for each `(neurons, alpha)` that it does not hold yet.

    `texts` are token ids; every token but the first of a text is predicted.
    """
    names = list(probes)
    loaded.model.train(False)
    with Appender(path, header) as out:
        done = {surprise.id for surprise in read_records(path, Surprise)[1]}
        with Meter(find_ffns(loaded.model), list(probes.values()), suppression=True) as meter:
            for neurons, alpha in tqdm(conditions, unit="condition", desc="perplexity"):
                id = f"{neurons}/{alpha:g}"
                if id in done:
                    continue
                row = (names.index(neurons), alpha)
                nats = tuple(_surprise(loaded, meter, row, ids) for ids in texts)
                out.append(Surprise(id=id, neurons=neurons, alpha=alpha, nats=nats))


@torch.inference_mode()
def _surprise(
    loaded: LoadedModel, meter: Meter, row: tuple[int, float], ids: Sequence[int]
) -> float:
    batch = torch.tensor([list(ids)], device=loaded.model.device)
    meter.begin([row])
    logits = loaded.model(input_ids=batch, use_cache=False).logits[0, :-1].float()
    logprobs = torch.log_softmax(logits, dim=-1).gather(-1, batch[0, 1:, None])
    return float(-logprobs.mean())
