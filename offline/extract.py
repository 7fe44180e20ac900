"""Verb `extract`: the CETT of every neuron at every token of an answer, and the baselines.

Teacher-forced over the ids that were collected; nothing is tokenised again. Written shard by shard
(offline/shards.py): memory holds one shard whatever the corpus, a shard that exists is not made
again, and several processes or machines can each make a part of the shards of one folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from offline.reader import Ids, Reader, Rows, Text, common_start
from offline.records import Answer, Label, RecordError, replacing
from offline.shards import (
    SHARD_KEY,
    FeaturesHeader,
    Kind,
    ShardInfo,
    parse_dtype,
    read_shard_info,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_PER_PASS = 2048
PADDING = 256  # slots per pass, at most, that hold no token
SHARD_BYTES = 2**29  # of its CETT; as much memory is taken while it is made


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


class Part(NamedTuple):
    """Which shards a process makes: every `step`-th, from number `first` on."""

    first: int
    step: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """`2/3` is the second of three processes; RecordError for anything else."""
        index, _, step = text.partition("/")
        if not (index.isdecimal() and step.isdecimal() and 1 <= int(index) <= int(step)):
            raise RecordError(f"part {text!r} is not I/N with 1 <= I <= N, such as 2/3")
        return cls(int(index) - 1, int(step))


EVERY_SHARD = Part(0, 1)


def make_items(
    answers: Sequence[Answer], labels: Sequence[Label], *, end_tokens: frozenset[int]
) -> list[Item]:
    """One item per used label; RecordError when labels and answers do not belong together.

    A label without a claim gives rows that nothing is fitted on, and they are its own (the
    reference code saved the previous answer's instead).
    """
    by_id = {answer.id: answer for answer in answers}
    items: list[Item] = []
    for label in labels:
        if label.dropped:
            continue
        if label.id not in by_id:
            raise RecordError(f"label {label.id!r} has no answer; run `label` again")
        answer = by_id[label.id]
        written = tuple(id for id in answer.token_ids if id not in end_tokens)
        if not written:
            continue
        kinds = [Kind.UNJUDGED] * len(written)
        other = Kind.PROSE if label.verdict == "ordinary" else Kind.SCAFFOLD
        claim = Kind.WRONG if label.verdict == "wrong" else Kind.RIGHT
        if max((*label.tokens, *label.others, -1)) >= len(written):
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
    part: Part = EVERY_SHARD,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the shards of `part` that `folder` lacks; returns how many rows the part holds.

    RecordError when `folder` holds shards of anything else.
    """
    if not items:
        raise RecordError("there is nothing to extract: no label is usable (see `label`'s counts)")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = parse_dtype(header.dtype)
    row_bytes = header.model.num_layers * header.model.intermediate_size * dtype.itemsize
    plan = list(_plan(items, rows_per_shard=max(1, shard_bytes // row_bytes)))
    infos = {
        folder / f"shard-{number:05d}.safetensors": ShardInfo(
            header=header, number=number, shards=len(plan), ids=tuple(item.id for item in shard)
        )
        for number, shard in enumerate(plan)
    }
    _require_same_run(folder, infos)
    reader = Reader(
        model,
        position=header.position,
        residual_layers=header.residual_layers,
        shared=common_start([item.prompt for item in items]),
        longest=max(item.length for item in items),
    )
    mine = list(zip(infos.items(), plan, strict=True))[part.first :: part.step]
    missing = [(path, info, shard) for (path, info), shard in mine if not path.exists()]
    with tqdm(
        total=sum(item.length for _, _, shard in missing for item in shard),
        unit="token",
        unit_scale=True,
        desc="extract",
        disable=None,
    ) as bar:
        for path, info, shard in missing:
            _write_shard(path, reader, info, shard, dtype, bar)
    return sum(len(item.written) for _, shard in mine for item in shard)


def _require_same_run(folder: Path, infos: Mapping[Path, ShardInfo]) -> None:
    """Shards of other labels, another model or another plan must not pass for this run's."""
    for path in sorted(folder.glob("shard-*.safetensors")):
        if read_shard_info(path) != infos.get(path):
            raise RecordError(
                f"{path} was made from other labels, or with another model, position or dtype; "
                f"empty {folder} and run again"
            )


def _plan(items: Sequence[Item], *, rows_per_shard: int) -> Iterator[list[Item]]:
    """Whole answers, alike in length so that batches hold little padding; always the same."""
    shard: list[Item] = []
    rows = 0
    for item in sorted(items, key=_alike):
        if shard and rows + len(item.written) > rows_per_shard:
            yield shard
            shard, rows = [], 0
        shard.append(item)
        rows += len(item.written)
    yield shard


def _alike(item: Item) -> tuple[int, int, Ids, str]:
    """Sorts by length of the answer, in steps of a quarter, then by prompt: answers to one prompt
    are neighbours where their lengths allow it."""
    return round(log(len(item.written), 1.25)), len(item.prompt), item.prompt, item.id


def _batches(items: Sequence[Item], *, shared: int) -> Iterator[list[Item]]:
    """Runs of items whose prompts (beyond `shared` tokens), and whose answers, fill a pass each
    without much padding: to a CPU a slot of padding costs as much as a token."""
    batch: list[Item] = []
    for item in items:
        if batch:
            full, padding = _slots([*batch, item], shared)
            if full > TOKENS_PER_PASS or padding > PADDING:
                yield batch
                batch = []
        batch.append(item)
    yield batch


def _slots(items: Sequence[Item], shared: int) -> tuple[int, int]:
    """Slots of the larger of both passes over `items`, and how many of both are padding."""
    rests = [len(prompt) - shared for prompt in {item.prompt for item in items}]
    written = [len(item.written) + 1 for item in items]
    passes = [(len(lengths) * max(lengths), sum(lengths)) for lengths in (rests, written)]
    return max(slots for slots, _ in passes), sum(slots - used for slots, used in passes)


def _write_shard(
    path: Path,
    reader: Reader,
    info: ShardInfo,
    items: Sequence[Item],
    dtype: torch.dtype,
    bar: tqdm[None],
) -> None:
    counts = [len(item.written) for item in items]
    rows = reader.empty(sum(counts), dtype)
    start = 0
    for batch in _batches(items, shared=len(reader.shared)):
        stop = start + sum(len(item.written) for item in batch)
        reader.read([Text(item.prompt, item.written) for item in batch], rows.part(start, stop))
        _require_finite(rows.part(start, stop), batch)
        start = stop
        bar.update(sum(item.length for item in batch))
    surprises = zip(
        torch.split(rows.logprob, counts), torch.split(rows.entropy, counts), strict=True
    )
    tensors = rows._asdict() | {
        "answer": torch.arange(len(items), dtype=torch.int32).repeat_interleave(
            torch.tensor(counts)
        ),
        "token": torch.cat([torch.arange(count, dtype=torch.int32) for count in counts]),
        "kind": torch.tensor([kind for item in items for kind in item.kinds], dtype=torch.uint8),
        "whole": torch.stack([_whole(logprob, entropy) for logprob, entropy in surprises]),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, {SHARD_KEY: msgspec.json.encode(info).decode()})


def _require_finite(rows: Rows, items: Sequence[Item]) -> None:
    """RecordError names the first answer that the model overflowed at: a fit would end in it."""
    finite = torch.stack([part.reshape(len(part), -1).isfinite().all(1) for part in rows]).all(0)
    counts = [len(item.written) for item in items]
    for item, of in zip(items, torch.split(finite, counts), strict=True):
        if not of.all():
            raise RecordError(
                f"the model gives numbers that are not finite while it reads answer {item.id!r}; "
                f"load it with another --model-dtype (bfloat16, float32)"
            )


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
