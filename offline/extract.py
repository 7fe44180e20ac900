"""Verb `extract`: the CETT of every neuron at every token of an answer, and the baselines.

One teacher-forced pass over the ids that were collected; nothing is tokenised again. Written shard
by shard: memory holds one shard whatever the corpus, and a shard that exists is not made again.

A shard (safetensors) has one row per token: `cett` [rows, layers * neurons], `residual` [rows,
chosen layers, hidden], `logprob`, `entropy` [rows] (nats; of the token given what stands before
it), `answer` [rows] (index into its `ids`), `token` [rows] (index into `token_ids`), `kind` [rows];
and per answer `whole` [answers, len(WHOLE)], statistics over all tokens that it wrote.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from offline.records import Answer, Label, Record, RecordError, write_atomic
from probes.card import ModelIdentity
from probes.cett import FORMULA_VERSION
from probes.neurons import find_ffns
from probes.tap import Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Position = Literal["read", "write"]

TOKENS_PER_PASS = 2048
ROWS_PER_SHARD = 2048
SHARD_KEY = "shard"
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


class ShardInfo(Record, frozen=True, kw_only=True):
    """The metadata of a shard. One value under one key: safetensors writes several keys in an order
    of its own, and a run that was killed must end byte-identical."""

    header: FeaturesHeader
    ids: tuple[str, ...]  # answers, as the rows' `answer` counts them


@dataclass(frozen=True)
class Item:
    """One answer and what each of its tokens is."""

    id: str
    prompt: tuple[int, ...]
    written: tuple[int, ...]  # without the end token
    kinds: tuple[Kind, ...]  # of `written`

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.written)


class _Pass(NamedTuple):
    """What one forward pass leaves, on the CPU."""

    cett: Tensor  # [rows, layers * neurons]
    residual: Tensor  # [rows, chosen layers, hidden]
    logprob: Tensor  # [rows]
    entropy: Tensor  # [rows]
    whole: Tensor  # [items, len(WHOLE)]


def make_items(
    answers: Sequence[Answer], labels: Sequence[Label], *, end_tokens: frozenset[int]
) -> list[Item]:
    """One item per used label; RecordError when labels and answers do not belong together.

    A label without tokens gives no item: it can give no row (the reference code saved the previous
    answer's instead).
    """
    by_id = {answer.id: answer for answer in answers}
    items: list[Item] = []
    for label in labels:
        if label.dropped or not (label.tokens or label.others):
            continue
        if label.id not in by_id:
            raise RecordError(f"label {label.id!r} has no answer; run `label` again")
        answer = by_id[label.id]
        written = tuple(id for id in answer.token_ids if id not in end_tokens)
        kinds = [Kind.UNJUDGED] * len(written)
        other = Kind.PROSE if label.verdict == "ordinary" else Kind.SCAFFOLD
        claim = Kind.WRONG if label.verdict == "wrong" else Kind.RIGHT
        if max(*label.tokens, *label.others, -1) >= len(written):
            raise RecordError(f"label {label.id!r} names a token that its answer does not have")
        for token in label.others:
            kinds[token] = other
        for token in label.tokens:
            kinds[token] = claim
        items.append(Item(answer.id, answer.prompt_token_ids, written, tuple(kinds)))
    return items


def extract(
    model: PreTrainedModel,
    items: Sequence[Item],
    folder: Path,
    *,
    header: FeaturesHeader,
    dtype: torch.dtype,
    rows_per_shard: int = ROWS_PER_SHARD,
) -> int:
    """Write the shards that `folder` lacks; returns how many rows all shards hold.

    `dtype` is that of the stored features; the arithmetic of CETT is float32 in any case.
    """
    if not items:
        raise RecordError("there is nothing to extract: no label is usable (see `label`'s counts)")
    folder.mkdir(parents=True, exist_ok=True)
    reader = _Reader(model, header)
    shards = list(_plan(items, rows_per_shard))
    with tqdm(total=len(items), unit="answer", desc="extract", disable=None) as bar:
        for number, shard in enumerate(shards):
            path = folder / f"shard-{number:05d}.safetensors"
            if not path.exists():
                _write_shard(path, reader, shard, header, dtype)
            bar.update(len(shard))
    surplus = sorted(folder.glob("shard-*.safetensors"))[len(shards) :]
    if surplus:
        raise RecordError(f"{surplus[0]} belongs to another run; empty {folder} and run again")
    return sum(len(item.written) for item in items)


def _plan(items: Sequence[Item], rows_per_shard: int) -> Iterator[list[Item]]:
    """Whole answers, alike in length so that batches hold little padding; always the same."""
    shard: list[Item] = []
    rows = 0
    for item in sorted(items, key=lambda item: (item.length, item.id)):
        if shard and rows + len(item.written) > rows_per_shard:
            yield shard
            shard, rows = [], 0
        shard.append(item)
        rows += len(item.written)
    yield shard


def _batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        if batch and (len(batch) + 1) * item.length > TOKENS_PER_PASS:  # ascending in length
            yield batch
            batch = []
        batch.append(item)
    yield batch


def _write_shard(
    path: Path,
    reader: _Reader,
    items: Sequence[Item],
    header: FeaturesHeader,
    dtype: torch.dtype,
) -> None:
    passes = [reader.read(batch, dtype) for batch in _batches(items)]
    rows = [(i, t, kind) for i, item in enumerate(items) for t, kind in enumerate(item.kinds)]
    tensors = {name: torch.cat([getattr(p, name) for p in passes]) for name in _Pass._fields}
    tensors["answer"] = torch.tensor([row[0] for row in rows], dtype=torch.int32)
    tensors["token"] = torch.tensor([row[1] for row in rows], dtype=torch.int32)
    tensors["kind"] = torch.tensor([row[2] for row in rows], dtype=torch.uint8)
    if len(rows) != len(tensors["cett"]):
        raise AssertionError(f"{path}: {len(tensors['cett'])} rows were read for {len(rows)}")
    info = ShardInfo(header=header, ids=tuple(item.id for item in items))
    write_atomic(path, save(tensors, {SHARD_KEY: msgspec.json.encode(info).decode()}))


class _Reader:
    """Teacher-forced passes over batches of items."""

    def __init__(self, model: PreTrainedModel, header: FeaturesHeader) -> None:
        self._model = model
        self._model.train(False)
        self._ffns = find_ffns(model)
        self._shift = 0 if header.position == "read" else -1
        self._residual_layers = header.residual_layers
        self._width = self._ffns[0].intermediate_size

    @torch.inference_mode()
    def read(self, items: Sequence[Item], dtype: torch.dtype) -> _Pass:
        """One pass; `cett` and `residual` in `dtype`, rows in the order of the items' tokens."""
        device = self._model.device
        longest = max(item.length for item in items)
        ids = torch.zeros(len(items), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(items):  # padded on the right: causal, so never seen
            ids[row, : item.length] = torch.tensor(item.prompt + item.written)
            mask[row, : item.length] = 1
        at = [(i, p) for i, m in enumerate(items) for p in range(len(m.prompt), m.length)]
        rows = torch.tensor([i for i, _ in at])
        columns = torch.tensor([p for _, p in at])
        cett = torch.empty(len(at), len(self._ffns) * self._width, dtype=dtype)

        def keep(layer: int, values: Tensor) -> None:
            values = values.reshape(len(items), longest, -1)  # OPT flattens its batch
            picked = values[rows.to(values.device), (columns + self._shift).to(values.device)]
            cett[:, layer * self._width : (layer + 1) * self._width] = picked.to(dtype).cpu()

        with Recorder(self._ffns, on_layer=keep):
            output = self._model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                output_hidden_states=True,
                use_cache=False,
            )
        residual = [
            output.hidden_states[k][rows.to(device), (columns + self._shift).to(device)]
            for k in self._residual_layers
        ]
        logprobs, entropies = _surprise(output.logits, ids.to(device), items)
        return _Pass(
            cett,
            torch.stack(residual, dim=1).to(dtype).cpu(),
            torch.cat(logprobs),
            torch.cat(entropies),
            torch.stack([_whole(x, y) for x, y in zip(logprobs, entropies, strict=True)]),
        )


def _surprise(
    logits: Tensor, ids: Tensor, items: Sequence[Item]
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probability and entropy (nats) of each written token, per item, float32 on the CPU.

    logits `[items, tokens, vocabulary]`; those of token p stand at p - 1, where it was predicted.
    """
    logprobs, entropies = [], []
    for row, item in enumerate(items):
        start, stop = len(item.prompt), item.length
        predicted = torch.log_softmax(logits[row, start - 1 : stop - 1].float(), dim=-1)
        logprobs.append(predicted.gather(-1, ids[row, start:stop, None])[:, 0].cpu())
        entropies.append(-(predicted.exp() * predicted).nan_to_num(0.0).sum(-1).cpu())
    return logprobs, entropies


def _whole(logprob: Tensor, entropy: Tensor) -> Tensor:
    """The statistics of WHOLE over one answer: `[len(WHOLE)]` float32."""
    return torch.stack(
        [
            logprob.mean(),
            logprob.min(),
            logprob.sum(),
            entropy.mean(),
            entropy.max(),
            torch.tensor(float(len(logprob))),
        ]
    )


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
    identity: ModelIdentity, position: Position, labels_sha256: str
) -> FeaturesHeader:
    """Header with the residual layers at 1/3, 1/2, 2/3 and 5/6 of the depth."""
    layers = identity.num_layers
    chosen = sorted({max(1, layers * part // 6) for part in (2, 3, 4, 5)})
    return FeaturesHeader(
        model=identity,
        formula_version=FORMULA_VERSION,
        position=position,
        labels_sha256=labels_sha256,
        residual_layers=tuple(chosen),
    )
