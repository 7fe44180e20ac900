"""The artifact: saved numbers come back, and what is not a sound probe is refused."""

from __future__ import annotations

import torch

from probes.probe import Probe


def test_what_is_saved_comes_back(make_probe, tmp_path):
    probe = make_probe()
    probe.save(tmp_path / "p")
    again = Probe.load(tmp_path / "p")
    assert again.card == probe.card
    assert again.id == probe.id
    for name in ("layer", "neuron", "weight", "column_norm", "suppress", "bias"):
        assert torch.equal(getattr(again, name), getattr(probe, name))
