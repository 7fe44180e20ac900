"""Random neurons as control: as many, in the same layers, none of the probe's own."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from offline.controls import draw_neurons
from offline.records import RecordError
from probes.probe import Probe


class _Card:
    class model:
        intermediate_size = 6


def _probe(layer: list[int], neuron: list[int], suppress: list[bool]) -> Probe:
    """What `draw_neurons` reads of a probe; the rest of an artifact has its own tests."""
    probe = object.__new__(Probe)
    for name, value in (
        ("card", _Card),
        ("layer", torch.tensor(layer)),
        ("neuron", torch.tensor(neuron)),
        ("suppress", torch.tensor(suppress)),
    ):
        object.__setattr__(probe, name, value)
    return probe


def test_a_control_has_as_many_neurons_in_each_layer_and_none_of_the_probes() -> None:
    """Other layers, or the same neurons, and the difference to the probe says something else."""
    probe = _probe([0, 0, 0, 3, 3, 5], [1, 2, 4, 0, 5, 2], [True, True, False, True, False, False])
    read = set(zip(probe.layer.tolist(), probe.neuron.tolist(), strict=True))
    for seed in range(20):
        drawn = [tuple(pair) for pair in draw_neurons(probe, np.random.default_rng(seed)).tolist()]
        assert Counter(layer for layer, _ in drawn) == {0: 2, 3: 1}
        assert len(set(drawn)) == 3
        assert not set(drawn) & read


def test_a_layer_with_too_few_other_neurons_is_refused() -> None:
    probe = _probe([0] * 4, [0, 1, 2, 3], [True] * 4)
    with pytest.raises(RecordError, match="layer 0 has 2 neurons"):
        draw_neurons(probe, np.random.default_rng(0))
