"""The shards of `extract`, read back: small columns at once, the wide ones by row and column."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from offline.records import RecordError
from offline.shards import WHOLE, FeaturesHeader, read_shard_info

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Features:
    """All rows of a run. Every row carries its answer; nothing is matched by order.

    answer [rows] index into `ids`; token [rows]; kind [rows] of `extract.Kind`; logprob, entropy
    [rows]; whole [answers, len(WHOLE)]
    """

    header: FeaturesHeader
    paths: tuple[Path, ...]
    starts: IntArray  # first row of each shard, and the end
    ids: tuple[str, ...]
    answer: IntArray
    token: IntArray
    kind: IntArray
    logprob: FloatArray
    entropy: FloatArray
    whole: FloatArray

    @property
    def width(self) -> int:
        """Neurons of all layers: `layer * intermediate_size + neuron` is a column of `cett`."""
        return self.header.model.num_layers * self.header.model.intermediate_size

    def cett(self, rows: IntArray, columns: IntArray | None = None) -> FloatArray:
        """`[rows, columns]` float32, in the order given; all columns when None."""
        return self._gather("cett", rows, columns)

    def residual(self, rows: IntArray, layer: int) -> FloatArray:
        """`[rows, hidden]` float32 of one of the header's residual layers."""
        k = self.header.residual_layers.index(layer)
        return self._gather("residual", rows, None, k)

    def followed_by(self, other: Features) -> Features:
        """All rows of `self`, then all of `other`, which were read alike."""
        both = {
            name: np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("token", "kind", "logprob", "entropy", "whole")
        }
        return Features(
            header=self.header,
            paths=(*self.paths, *other.paths),
            starts=np.concatenate([self.starts, self.starts[-1] + other.starts[1:]]),
            ids=(*self.ids, *other.ids),
            answer=np.concatenate([self.answer, len(self.ids) + other.answer]),
            **both,
        )

    def _gather(
        self, name: str, rows: IntArray, columns: IntArray | None, k: int | None = None
    ) -> FloatArray:
        home = np.searchsorted(self.starts, rows, side="right") - 1
        out: FloatArray | None = None
        for shard in np.unique(home):
            here = np.flatnonzero(home == shard)
            with safe_open(self.paths[shard], framework="pt") as file:
                tensor = file.get_tensor(name)
                tensor = tensor if k is None else tensor[:, k]
                part = tensor[torch.from_numpy(rows[here] - self.starts[shard])]
                if columns is not None:
                    part = part[:, torch.from_numpy(columns)]
            if out is None:
                out = np.empty((len(rows), part.shape[1]), np.float32, order="F")
            out[here] = part.float().numpy()
        if out is None:
            raise RecordError(f"no rows of {name} were asked for")
        return out


def load_features(folder: Path) -> Features:
    """RecordError when a shard is missing, or was made by another run than its neighbours."""
    paths = tuple(sorted(folder.glob("shard-*.safetensors")))
    if not paths:
        raise RecordError(f"{folder} holds no shards; run `extract` first")
    first = read_shard_info(paths[0])
    if len(paths) != first.shards:
        raise RecordError(
            f"{folder} has {len(paths)} of {first.shards} shards; run `extract` again"
        )
    ids: list[str] = []
    columns: dict[str, list[NDArray[np.generic]]] = {
        name: [] for name in ("answer", "token", "kind", "logprob", "entropy", "whole")
    }
    starts = [0]
    for path in paths:
        info = read_shard_info(path)
        if (info.header, info.shards) != (first.header, first.shards):
            raise RecordError(f"{path} was made by another run than {paths[0]}; extract again")
        with safe_open(path, framework="pt") as file:
            for name, parts in columns.items():
                parts.append(file.get_tensor(name).numpy())
            rows = file.get_slice("cett").get_shape()[0]
        answer = columns["answer"][-1]
        if not (len(answer) == len(columns["kind"][-1]) == rows):
            raise RecordError(f"{path}: {rows} rows of features, {len(answer)} rows of labels")
        if len(columns["whole"][-1]) != len(info.ids):
            raise RecordError(
                f"{path}: {len(info.ids)} answers, {len(columns['whole'][-1])} statistics"
            )
        columns["answer"][-1] = answer.astype(np.int64) + len(ids)
        ids += info.ids
        starts.append(starts[-1] + rows)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    if joined["whole"].shape[1] != len(WHOLE):
        raise RecordError(f"{folder} was made by another version; extract again")
    return Features(
        header=first.header,
        paths=paths,
        starts=np.array(starts),
        ids=tuple(ids),
        answer=joined["answer"].astype(np.int64),
        token=joined["token"].astype(np.int64),
        kind=joined["kind"].astype(np.int64),
        logprob=joined["logprob"].astype(np.float32),
        entropy=joined["entropy"].astype(np.float32),
        whole=joined["whole"].astype(np.float32),
    )
