"""What benchmarks and other tests take for a probe."""

from __future__ import annotations

import torch

from probes.random_probe import random_probe


def test_its_neurons_are_distinct_and_have_their_own_norms(make_card):
    """A norm of another neuron would make every comparison with a reference fail, or none."""
    norms = torch.arange(3.0 * 48).reshape(3, 48) + 1
    identity = make_card().model
    probe = random_probe(identity, norms, name="random", neurons=20)
    places = list(zip(probe.layer.tolist(), probe.neuron.tolist(), strict=True))
    assert len(set(places)) == 20
    assert len({layer for layer, _ in places}) == 3
    assert probe.column_norm.tolist() == [float(norms[place]) for place in places]
    assert 0 < int(probe.suppress.sum()) < 20


def test_a_seed_names_a_probe(make_card):
    """Two probes of one test must not be the same; one of two tests must."""
    norms, identity = torch.ones(3, 48), make_card().model
    ids = [random_probe(identity, norms, name="r", neurons=5, seed=s).id for s in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
