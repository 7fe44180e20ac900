"""The artifact: a folder with `probe.json` (card), `probe.safetensors` (numbers) and README.md.

`Probe` is frozen; it is fitted elsewhere (`offline/fit.py`), saved once, and loaded by reading
bytes. Nothing here executes what it loads. It checks itself when it is made, so a probe that exists
is a sound one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from probes.card import SCHEMA_VERSION, ProbeCard, Record, other_schema
from probes.errors import ProbeFormatError
from probes.files import read_regular_file, refuse_executable, write_folder

MAX_NEURONS = 65536
MAX_WEIGHT = 1e8  # per unit of CETT; a folded scaler makes weights large, never this large

CARD_FILE = "probe.json"
README_FILE = "README.md"
TENSORS_FILE = "probe.safetensors"


class _CardFile(Record, frozen=True, kw_only=True):
    """What stands in probe.json: the card, and the sha256 of its bytes as they stand there."""

    card_sha256: str
    card: msgspec.Raw


class _Schema(msgspec.Struct):
    """The one field that cards of all schemas have."""

    schema_version: int


_TENSORS = {
    "layer": torch.int64,
    "neuron": torch.int64,
    "weight": torch.float32,
    "column_norm": torch.float32,
    "suppress": torch.bool,
    "bias": torch.float32,
}


@dataclass(frozen=True, eq=False)
class Probe:
    """A sparse linear reader of `neurons` = len(layer) neurons with `heads` outputs.

    layer        [neurons] int64, 0-based, ascending with `neuron`; each pair once
    neuron       [neurons] int64, column of the down projection
    weight       [neurons, heads] float32, scaler folded in; no neuron is zero in every head
    column_norm  [neurons] float32, > 0
    suppress     [neurons] bool, the suppression set (H-Neurons: positive token weight)
    bias         [heads] float32

    On the CPU. ProbeFormatError when the numbers do not fit the card.
    """

    card: ProbeCard
    layer: Tensor
    neuron: Tensor
    weight: Tensor
    column_norm: Tensor
    suppress: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        _require_sound(self)

    @classmethod
    def make(
        cls,
        card: ProbeCard,
        *,
        layer: ArrayLike,
        neuron: ArrayLike,
        weight: ArrayLike,
        column_norm: ArrayLike,
        bias: ArrayLike,
        suppress: ArrayLike | None = None,
    ) -> Probe:
        """A probe from fitted numbers in any order, scaler folded in (see `fold_scaler`).

        Sorts by (layer, neuron), drops neurons without weight, writes the tensors' sha256 into the
        card. `suppress` None: the H-Neurons, those with a positive weight in the token head.
        """
        layers, neurons = np.asarray(layer, np.int64), np.asarray(neuron, np.int64)
        weights = np.asarray(weight, np.float32)
        if suppress is None:
            suppress = weights[:, card.heads.index(card.token.head)] > 0
        order = np.lexsort((neurons, layers))
        order = order[(weights[order] != 0).any(axis=1)]
        tensors = {
            "layer": torch.from_numpy(layers[order]),
            "neuron": torch.from_numpy(neurons[order]),
            "weight": torch.from_numpy(weights[order]),
            "column_norm": torch.from_numpy(np.asarray(column_norm, np.float32)[order]),
            "suppress": torch.from_numpy(np.asarray(suppress, np.bool_)[order]),
            "bias": torch.from_numpy(np.array(bias, np.float32)),
        }
        digest = hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()
        return cls(card=msgspec.structs.replace(card, tensors_sha256=digest), **tensors)

    @property
    def id(self) -> str:
        """`name@sha`: what responses and metrics call this probe."""
        return f"{self.card.name}@{self.sha256[:12]}"

    @cached_property
    def sha256(self) -> str:
        """Of the card, which holds the tensors' own: differs when any number or rule differs."""
        return hashlib.sha256(msgspec.json.encode(self.card, order="deterministic")).hexdigest()

    @property
    def h_neurons(self) -> tuple[tuple[int, int], ...]:
        """(layer, neuron) of the neurons with a positive weight in the token head."""
        positive = self.weight[:, self.head(self.card.token.head)] > 0
        return tuple(
            zip(self.layer[positive].tolist(), self.neuron[positive].tolist(), strict=True)
        )

    def head(self, name: str) -> int:
        """Column of a head; ValueError for an unknown name."""
        return self.card.heads.index(name)

    @classmethod
    def load(cls, path: Path) -> Probe:
        """Read, verify and freeze the probe in folder `path`; ProbeFormatError says what is wrong.

        Each file is opened once and parsed from the bytes that were hashed, so that a file which
        is rewritten meanwhile can neither slip in nor crash a reader.
        """
        if not path.is_dir():
            refuse_executable(path)
            raise ProbeFormatError(f"{path} is not a folder; a probe is one that holds {CARD_FILE}")
        card = _parse_card(read_regular_file(path / CARD_FILE), path=path / CARD_FILE)
        content = read_regular_file(path / TENSORS_FILE)
        found = hashlib.sha256(content).hexdigest()
        if found != card.tensors_sha256:
            raise ProbeFormatError(
                f"{path / TENSORS_FILE} is damaged or not of this card: sha256 {found}, "
                f"the card says {card.tensors_sha256}"
            )
        try:
            tensors = safetensors.torch.load(content)
        except (safetensors.SafetensorError, KeyError, ValueError) as exc:
            raise ProbeFormatError(
                f"{path / TENSORS_FILE} is not a safetensors file: {exc}"
            ) from exc
        if tensors.keys() != _TENSORS.keys():
            raise ProbeFormatError(
                f"{path / TENSORS_FILE} holds {sorted(tensors)}, expected {sorted(_TENSORS)}"
            )
        probe = cls(card=card, **tensors)
        _require_known_answers(probe)
        return probe

    def save(self, path: Path, *, readme: str | None = None) -> None:
        """Write the new folder `path` atomically; ProbeError when it exists.

        `readme` lies beside the probe for people and hubs; it is never read.
        """
        _require_known_answers(self)
        content = safetensors.torch.save({name: getattr(self, name) for name in _TENSORS})
        if hashlib.sha256(content).hexdigest() != self.card.tensors_sha256:
            raise ProbeFormatError("tensors_sha256 of the card is not of these tensors: Probe.make")
        card = msgspec.json.format(msgspec.json.encode(self.card, order="deterministic"), indent=1)
        digest = hashlib.sha256(card).hexdigest().encode()
        envelope = b'{"card_sha256": "%b",\n"card": %b}\n' % (digest, card)
        files = {CARD_FILE: envelope, TENSORS_FILE: content}
        write_folder(path, files | ({} if readme is None else {README_FILE: readme.encode()}))


def fold_scaler(
    weight: NDArray[np.float64],
    bias: NDArray[np.float64],
    *,
    mean: NDArray[np.float64],
    scale: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights of the standardised features -> weights of the raw ones, same logit.

    weight `[neurons, heads]`, bias `[heads]` read `(x - mean) / scale`; mean, scale `[neurons]`.
    """
    folded = weight / scale[:, None]
    return folded, bias - mean @ folded


def _parse_card(content: bytes, *, path: Path) -> ProbeCard:
    try:
        file = msgspec.json.decode(content, type=_CardFile)
        found = hashlib.sha256(bytes(file.card)).hexdigest()
        if found != file.card_sha256:
            raise ProbeFormatError(
                f"{path} is damaged or was edited: sha256 of the card is {found}, "
                f"the file says {file.card_sha256}"
            )
        # First: a card of another schema has other fields, and its reader should hear why.
        schema = msgspec.json.decode(file.card, type=_Schema).schema_version
        if schema != SCHEMA_VERSION:
            raise ProbeFormatError(f"{path} is not a probe card: {other_schema(schema)}")
        return msgspec.json.decode(file.card, type=ProbeCard)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:  # ValidationError is a DecodeError
        raise ProbeFormatError(f"{path} is not a probe card: {exc}") from exc


def _require_known_answers(probe: Probe) -> None:
    if not probe.card.known_answers:
        raise ProbeFormatError(
            f"probe {probe.id!r} has no known answers, so no engine can prove that it reads it; "
            f"add some (probes.known_answer.build)"
        )


def _require_sound(probe: Probe) -> None:
    """ProbeFormatError with the first thing that is wrong with the numbers of `probe`."""
    if probe.layer.dim() != 1:
        raise ProbeFormatError(f"tensor layer is {list(probe.layer.shape)}, expected [neurons]")
    neurons, heads = len(probe.layer), len(probe.card.heads)
    shapes = dict.fromkeys(_TENSORS, (neurons,)) | {"weight": (neurons, heads), "bias": (heads,)}
    for name, dtype in _TENSORS.items():
        tensor: Tensor = getattr(probe, name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shapes[name]:
            raise ProbeFormatError(
                f"tensor {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {dtype} {list(shapes[name])}"
            )
    if not 1 <= neurons <= MAX_NEURONS:
        raise ProbeFormatError(f"a probe has 1 to {MAX_NEURONS} neurons, not {neurons}")
    for name, size in (
        ("layer", probe.card.model.num_layers),
        ("neuron", probe.card.model.intermediate_size),
    ):
        tensor = getattr(probe, name)
        if int(tensor.min()) < 0 or int(tensor.max()) >= size:
            raise ProbeFormatError(
                f"{name} must be in [0, {size}), found {int(tensor.min())}..{int(tensor.max())}"
            )
    flat = probe.layer * probe.card.model.intermediate_size + probe.neuron
    if not bool((flat.diff() > 0).all()):
        raise ProbeFormatError("(layer, neuron) pairs must be ascending and each pair unique")
    for name in ("weight", "bias"):
        if not bool((getattr(probe, name).abs() <= MAX_WEIGHT).all()):  # NaN compares false
            raise ProbeFormatError(f"{name} must be finite and at most {MAX_WEIGHT:g} in magnitude")
    if not bool((probe.weight != 0).any(dim=1).all()):
        raise ProbeFormatError("every neuron needs a non-zero weight in at least one head")
    if not bool(((probe.column_norm > 0) & probe.column_norm.isfinite()).all()):
        raise ProbeFormatError("column_norm must be finite and > 0")
