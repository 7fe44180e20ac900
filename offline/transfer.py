"""Verb `transfer`: does a probe read a sibling of its model, such as the base model of an
instruction-tuned one, and how far have its neurons moved (Gao et al. 2025, figure 4)?

The answers are those of the run, written by the probe's own model; the sibling reads them, teacher-
forced. Nothing here makes the probe fit to serve: a server refuses it on the sibling as before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from offline import metrics
from offline.dataset import Names, load_dataset
from offline.extract import extract, make_items
from offline.features import Features, IntArray, load_features
from offline.metrics import Bools, Floats
from offline.models import LoadedModel
from offline.records import Record, RecordError, write_atomic
from offline.shards import Kind
from offline.tables import measured
from probes.card import EvaluationRow, ModelIdentity
from probes.fingerprint import match
from probes.neurons import FFN, find_ffns
from probes.probe import Probe

log = logging.getLogger(__name__)

RANDOM_SETS = 1000


class Drift(Record, frozen=True, kw_only=True):
    """How far the weights of the H-Neurons (positive weight in the token head) have moved.

    A neuron's drift is 1 - cosine between its weights in both models: its column of the down
    projection and its rows of the projections that feed it, end to end.
    """

    neurons: int
    mean: float
    mean_of_all: float  # neurons of the model
    rank: float  # mean share of its layer's neurons that moved less; 0.5 is no different
    p_value: float  # of equally many random neurons of the same layers: share as far from 0.5


class Transfer(Record, frozen=True, kw_only=True):
    """What `transfer` found; rows named `own model` and `sibling`."""

    probe: str
    sibling: str
    differs: tuple[str, ...]  # fields in which the sibling is not the probe's model
    rows: tuple[EvaluationRow, ...]
    drift: Drift | None  # without the probe's own model it is not known


def require_sibling(probe: Probe, found: ModelIdentity) -> tuple[str, ...]:
    """Fields in which `found` differs; RecordError unless shape and tokenizer are the probe's."""
    expected = probe.card.model
    for field in ("num_layers", "intermediate_size", "hidden_size", "tokenizer_sha256"):
        if getattr(expected, field) != getattr(found, field):
            raise RecordError(
                f"{found.model_id} is no sibling of {expected.model_id}: {field} is "
                f"{getattr(found, field)!r}, the probe's model has {getattr(expected, field)!r}"
            )
    names = (field for field in expected.__struct_fields__ if field not in ("model_id", "revision"))
    return tuple(name for name in names if getattr(expected, name) != getattr(found, name))


def transfer(probe: Probe, sibling: LoadedModel, run: Path, *, own: LoadedModel | None) -> Transfer:
    """Read the run's test answers with the sibling; result and features go into `run/transfer/`.

    RecordError when the sibling is of another shape or tokenizer, or `own` is not the probe's
    model (ProbeMismatchError).
    """
    differs = require_sibling(probe, sibling.identity)
    if own is not None:
        match(probe, own.identity)
    data = load_dataset(run)
    header = data.features.header
    if header.model.weights_fingerprint != probe.card.model.weights_fingerprint:
        raise RecordError(f"{run} holds features of another model than {probe.id}'s")
    if header.labels_sha256 != probe.card.training.get("labels_sha256"):
        raise RecordError(
            f"{probe.id} was fitted on other labels than {run} holds, and may have seen what is "
            f"tested there; give the run that made it"
        )
    if header.position != probe.card.position:
        raise RecordError(
            f"{probe.id} reads in the {probe.card.position} pass, the features of {run} were read "
            f"in the {header.position} pass; give the run that made it"
        )
    tested = {
        answer.id: str(data.unit[first])
        for answer, first in zip(data.answers[: data.own], data.first, strict=False)
        if data.part[first] == "test"
    }
    items = make_items(
        [answer for answer in data.answers[: data.own] if answer.id in tested],
        [label for label in data.labels[: data.own] if label.id in tested],
        end_tokens=sibling.end_tokens,
    )
    folder = run / "transfer" / Path(sibling.identity.model_id).name
    there = msgspec.structs.replace(header, model=sibling.identity)
    extract(sibling.model, items, folder / "features", header=there)
    rows = [
        *_rows(probe, data.features, tested, detector="own model"),
        *_rows(probe, load_features(folder / "features"), tested, detector="sibling"),
    ]
    found = Transfer(
        probe=probe.id,
        sibling=sibling.identity.model_id,
        differs=differs,
        rows=tuple(rows),
        drift=None if own is None else drift(probe, own.model, sibling.model),
    )
    write_atomic(folder / "transfer.json", msgspec.json.encode(found))
    return found


def table(found: Transfer) -> str:
    """What is printed."""
    lines = [f"{found.probe} on {found.sibling} (differs in: {', '.join(found.differs) or '-'})"]
    for row in found.rows:
        interval = f"[{row.low:.3f}, {row.high:.3f}]"
        lines.append(f"{row.dataset:<44}{row.detector:<12}AUROC {row.value:.3f} {interval}")
    if found.drift is not None:
        moved = found.drift
        lines.append(
            f"drift of {moved.neurons} H-Neurons {moved.mean:.2e}, of all neurons "
            f"{moved.mean_of_all:.2e}; rank among their layer's {moved.rank:.3f} (0.5: like any, "
            f"p = {moved.p_value:.3f} against {RANDOM_SETS} random sets)"
        )
    return "\n".join(lines)


def _rows(
    probe: Probe, features: Features, tested: Mapping[str, str], *, detector: str
) -> Iterator[EvaluationRow]:
    """AUROC of the token head on stored features of the answers `tested` (id -> unit)."""
    chosen = np.array([id in tested for id in features.ids])[features.answer]
    unit = np.array([tested.get(id, "") for id in features.ids])
    rows = np.flatnonzero(chosen & (features.kind != Kind.UNJUDGED))
    wrong = features.kind == Kind.WRONG
    claims = chosen & (wrong | (features.kind == Kind.RIGHT))
    logit = np.full(len(wrong), np.nan)
    logit[rows] = token_logits(probe, features, rows)
    claimed = np.unique(features.answer[claims])
    means = np.array([logit[claims & (features.answer == i)].mean() for i in claimed])
    of_answer = np.array([bool(wrong[features.answer == i].any()) for i in claimed])
    for dataset, positive, score, units in (
        (
            "tokens, wrong claims against all others",
            wrong[rows],
            logit[rows],
            unit[features.answer[rows]],
        ),
        ("claims, wrong against right", of_answer, means, unit[claimed]),
    ):
        yield _auroc(dataset, detector, positive, score, units)


def token_logits(probe: Probe, features: Features, rows: IntArray) -> Floats:
    """`[rows]` of the token head: what the meter would read, from stored features."""
    columns = probe.layer.numpy() * features.header.model.intermediate_size + probe.neuron.numpy()
    head = probe.head(probe.card.token.head)
    values = features.cett(rows, columns).astype(np.float64)
    logits: Floats = values @ probe.weight[:, head].double().numpy() + float(probe.bias[head])
    return logits


def drift(probe: Probe, own: nn.Module, sibling: nn.Module) -> Drift:
    """Of the probe's H-Neurons, beside all neurons and random ones of the same layers."""
    pairs = zip(find_ffns(own), find_ffns(sibling), strict=True)
    by_layer = [_moved(_weights(own, one), _weights(sibling, other)) for one, other in pairs]
    moved = torch.stack(by_layer).numpy()  # [layers, neurons]
    ranks = moved.argsort(axis=1).argsort(axis=1) / (moved.shape[1] - 1)
    layers, neurons = (np.array(part) for part in zip(*probe.h_neurons, strict=True))
    found = float(ranks[layers, neurons].mean())
    random = np.random.default_rng(0)
    drawn = np.array(
        [
            ranks[layers, random.integers(moved.shape[1], size=len(layers))].mean()
            for _ in range(RANDOM_SETS)
        ]
    )
    return Drift(
        neurons=len(layers),
        mean=float(moved[layers, neurons].mean()),
        mean_of_all=float(moved.mean()),
        rank=found,
        # The found set is one of those that it is compared with: never 0 (Phipson and Smyth 2010).
        p_value=(1 + int((np.abs(drawn - 0.5) >= abs(found - 0.5)).sum())) / (1 + RANDOM_SETS),
    )


def _weights(model: nn.Module, ffn: FFN) -> Tensor:
    """`[neurons, inputs]` float32: everything that belongs to each neuron of one layer."""
    width = ffn.intermediate_size
    parts = [ffn.weight if ffn.transposed else ffn.weight.T]
    parent = model.get_submodule(ffn.name.rpartition(".")[0])
    for module in parent.children():
        weight = getattr(module, "weight", None)
        if module is ffn.module or not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        rows = weight.T if type(module).__name__ == "Conv1D" else weight
        if rows.shape[0] % width == 0:  # one projection, or several in one matrix
            parts += torch.split(rows, width)
    return torch.cat([part.detach().float().cpu() for part in parts], dim=1)


def _moved(one: Tensor, other: Tensor) -> Tensor:
    return 1 - torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=1)


def _auroc(
    dataset: str, detector: str, positive: Bools, score: Floats, units: Names
) -> EvaluationRow:
    if positive.all() or not positive.any():
        raise RecordError(f"{dataset}: the run's test part holds one class only")
    figure = metrics.with_interval(metrics.auroc, positive, score, units)
    log.info("%-44s %-12s AUROC %.3f [%.3f, %.3f]", dataset, detector, *figure[:3])
    return measured(dataset, detector, "auroc", figure)
