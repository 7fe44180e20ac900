"""The files of `extract`: shards, and what a header says of them.

A shard (safetensors) has one row per token: `cett` [rows, layers * neurons], `residual` [rows,
chosen layers, hidden], `logprob`, `entropy` [rows] (nats; of the token given what stands before
it), `answer` [rows] (index into its `ids`), `token` [rows] (index into `token_ids`), `kind` [rows];
and per answer `whole` [answers, len(WHOLE)], statistics over all tokens that it wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from offline.reader import Position
from offline.records import Record, RecordError
from probes.card import ModelIdentity
from probes.cett import FORMULA_VERSION

DEPTHS = (1 / 3, 1 / 2, 2 / 3, 5 / 6, 19 / 20)  # of residual layers: best ones lie in the middle
SHARD_KEY = "shard"
FOLDERS = {"labels.jsonl": "features", "given.jsonl": "features-given"}  # of what
WHOLE = ("logprob_mean", "logprob_min", "logprob_sum", "entropy_mean", "entropy_max", "length")


class Kind(IntEnum):
    """What a row's token is."""

    SCAFFOLD = 0  # of a short answer: repeats the question or joins its parts
    RIGHT = 1  # claim of a right answer
    WRONG = 2  # claim of a wrong answer
    PROSE = 3  # of a long answer to an ordinary prompt
    UNJUDGED = 4  # what a short answer adds after its claim; pooled, never fitted on


class FeaturesHeader(Record, frozen=True, kw_only=True):
    """What the features are of; shards of one folder agree in it."""

    model: ModelIdentity
    formula_version: int
    position: Position
    labels_sha256: str
    residual_layers: tuple[int, ...]  # index into transformers' hidden_states, 0 = embeddings
    dtype: str = "float16"  # of stored `cett`
    residual_dtype: Literal["float32"]  # large models leave float16's range

    def check_alike(self, like: FeaturesHeader, name: str) -> None:
        """RecordError unless both were read in one way; their labels are each one's own."""
        for field in self.__struct_fields__:
            here, there = getattr(self, field), getattr(like, field)
            if field != "labels_sha256" and here != there:
                raise RecordError(
                    f"the features of {name} were read otherwise than those of the answers: "
                    f"{field} is {here!r}, theirs {there!r}; delete {name} and make it again"
                )


class ShardInfo(Record, frozen=True, kw_only=True):
    """The metadata of a shard. One value under one key: safetensors writes several keys in an order
    of its own, and a run that was killed must end byte-identical."""

    header: FeaturesHeader
    number: int = 0  # among `shards`; a folder that lacks one is not read
    shards: int = 1
    ids: tuple[str, ...]  # answers, as the rows' `answer` counts them


def parse_position(text: str) -> Position:
    """RecordError for anything but read and write."""
    if text not in ("read", "write"):
        raise RecordError(f"position {text!r} is not one of read, write")
    return "read" if text == "read" else "write"


def parse_dtype(text: str) -> torch.dtype:
    """RecordError for a dtype that features are not stored in."""
    if text not in ("float16", "bfloat16", "float32"):
        raise RecordError(f"dtype {text!r} is not one of float16, bfloat16, float32")
    dtype = getattr(torch, text)
    assert isinstance(dtype, torch.dtype)
    return dtype


def features_header(
    identity: ModelIdentity,
    position: Position,
    labels_sha256: str,
    *,
    dtype: str,
    residual_layers: Sequence[int] = (),
) -> FeaturesHeader:
    """RecordError for a layer that the model does not have.

    dtype            of the stored features; the arithmetic of CETT is float32 in any case
    residual_layers  whose output the dense rivals read; none: those at DEPTHS
    """
    parse_dtype(dtype)
    layers = identity.num_layers
    chosen = sorted(set(residual_layers or [max(1, int(layers * depth)) for depth in DEPTHS]))
    if not 1 <= chosen[0] <= chosen[-1] <= layers:
        raise RecordError(f"residual layers {chosen} are not all in 1..{layers}")
    return FeaturesHeader(
        model=identity,
        formula_version=FORMULA_VERSION,
        position=position,
        labels_sha256=labels_sha256,
        residual_layers=tuple(chosen),
        dtype=dtype,
        residual_dtype="float32",
    )


def read_shard_info(path: Path) -> ShardInfo:
    """RecordError when `path` is no shard of this version."""
    try:
        with safe_open(path, framework="pt") as file:
            return msgspec.json.decode((file.metadata() or {}).get(SHARD_KEY, ""), type=ShardInfo)
    except (SafetensorError, msgspec.DecodeError) as exc:
        raise RecordError(f"{path} is not a shard of features: {exc}; delete it") from exc
