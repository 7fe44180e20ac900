"""What the effect of alpha is compared with: as many random neurons of the same layers.

A control is a probe like any other, written as an artifact and served by the same server: only its
suppression set was drawn instead of found. What it reads means nothing.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from offline.models import LoadedModel
from offline.publish import with_known_answers
from offline.records import RecordError
from probes.fingerprint import match
from probes.neurons import FFN, find_ffns
from probes.probe import Probe

NOT_GOOD_FOR = (
    "It is a control for experiments with alpha. Its neurons were drawn at random and its risk "
    "means nothing.",
)


def draw_neurons(probe: Probe, random: np.random.Generator) -> NDArray[np.int64]:
    """`[neurons, 2]` (layer, neuron): per layer as many as `probe` suppresses there, none of which
    it reads. RecordError when a layer has too few others."""
    drawn = []
    layers, counts = np.unique(probe.layer[probe.suppress].numpy(), return_counts=True)
    for layer, count in zip(layers.tolist(), counts.tolist(), strict=True):
        read = probe.neuron[probe.layer == layer].numpy()
        others = np.setdiff1d(np.arange(probe.card.model.intermediate_size), read)
        if len(others) < count:
            raise RecordError(
                f"layer {layer} has {len(others)} neurons that the probe does not read, too few "
                f"for a control of {count}"
            )
        chosen = np.sort(random.choice(others, count, replace=False))
        drawn.append(np.stack([np.full(count, layer), chosen], axis=1))
    return np.concatenate(drawn)


def make_control(
    probe: Probe, number: int, *, seed: int, loaded: LoadedModel, ffns: tuple[FFN, ...]
) -> Probe:
    """Control `number` of `probe`: reads the mean CETT of its neurons, suppresses all of them."""
    layer, neuron = draw_neurons(probe, np.random.default_rng((seed, number))).T
    norms = torch.stack([ffn.column_norms().cpu() for ffn in ffns])
    heads = len(probe.card.heads)
    card = msgspec.structs.replace(
        probe.card,
        name=f"{probe.card.name[:50]}-random-{number}",
        training={"control of": probe.id, "seed": f"{seed}, {number}"},
        evaluation=(),
        reliability=(),
        not_good_for=NOT_GOOD_FOR,
    )
    control = Probe.make(
        card,
        layer=layer,
        neuron=neuron,
        weight=np.full((len(layer), heads), 1 / len(layer)),
        column_norm=norms[layer, neuron].numpy(),
        bias=np.zeros(heads),
        suppress=np.ones(len(layer)),
    )
    sequences = [answer.token_ids for answer in probe.card.known_answers]
    return with_known_answers(control, loaded.model, ffns, sequences)


def load_or_make_controls(
    folder: Path, probe: Probe, *, count: int, seed: int, loaded: LoadedModel
) -> dict[str, Path]:
    """`random-1`, .. -> folder of the controls, written where they are missing.

    RecordError when one that exists is of another probe or seed: its answers would be mixed up.
    """
    match(probe, loaded.identity)
    ffns = find_ffns(loaded.model)
    paths: dict[str, Path] = {}
    for number in range(1, count + 1):
        path = folder / f"random-{number}"
        if not path.exists():
            make_control(probe, number, seed=seed, loaded=loaded, ffns=ffns).save(path)
        found = Probe.load(path).card
        if found.training != {"control of": probe.id, "seed": f"{seed}, {number}"}:
            raise RecordError(
                f"{path} is a control of {found.training}, not of {probe.id} with seed {seed}; "
                f"choose another --out folder"
            )
        paths[path.name] = path
    return paths
