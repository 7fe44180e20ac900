"""Siblings: what is refused, what drift means."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from offline.records import RecordError
from offline.transfer import drift, require_sibling, transfer
from probes.fingerprint import identity
from probes.neurons import find_ffns
from probes.probe import Probe
from server.engines.fake_model import fake_probe


@pytest.fixture
def probe(tiny_model: LlamaForCausalLM) -> Probe:
    """Two H-Neurons, (0, 3) and (2, 5), and a neuron with a negative weight."""
    ffns = find_ffns(tiny_model)
    found = identity(
        tiny_model, ffns, model_id="tiny", revision="", tokenizer_sha256="t",
        chat_template_sha256="c",
    )  # fmt: skip
    card = msgspec.structs.replace(fake_probe().card, model=found, known_answers=())
    layer, neuron = np.array([0, 2, 1]), np.array([3, 5, 7])
    weight = np.repeat(np.array([[1.0], [2.0], [-1.0]]), len(card.heads), axis=1)
    norms = torch.stack([ffn.column_norms() for ffn in ffns])[layer, neuron]
    bias = np.zeros(len(card.heads))
    return Probe.make(
        card, layer=layer, neuron=neuron, weight=weight, column_norm=norms.numpy(), bias=bias
    )


def test_drift_is_that_of_the_h_neurons_alone(tiny_model: LlamaForCausalLM, probe: Probe) -> None:
    """Turning round what belongs to them is the largest drift there is; doubling it is none, since
    a direction is what a neuron reads and writes."""
    assert drift(probe, tiny_model, tiny_model).mean == pytest.approx(0, abs=1e-6)
    moved = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for layer, neuron in ((0, 3), (2, 5)):
            mlp = moved.model.layers[layer].mlp
            mlp.down_proj.weight[:, neuron] *= -1
            mlp.up_proj.weight[neuron] *= -1
            mlp.gate_proj.weight[neuron] *= -1
        moved.model.layers[1].mlp.down_proj.weight *= 2
        moved.model.layers[1].mlp.up_proj.weight *= 2
        moved.model.layers[1].mlp.gate_proj.weight *= 2
    found = drift(probe, tiny_model, moved)
    assert found.neurons == 2
    assert found.mean == pytest.approx(2, abs=1e-5)
    assert found.mean_of_all == pytest.approx(2 * 2 / (3 * 24), abs=1e-5)
    assert found.rank == pytest.approx(1)
    assert found.p_value < 0.05


@pytest.mark.parametrize("field", ["num_layers", "intermediate_size", "hidden_size"])
def test_another_shape_is_no_sibling(probe: Probe, field: str) -> None:
    """A column of another width is another neuron: the logits would be noise that looks real."""
    other = msgspec.structs.replace(probe.card.model, **{field: 7})
    with pytest.raises(RecordError, match=field):
        require_sibling(probe, other)


def test_another_tokenizer_is_no_sibling_and_other_weights_are_named(probe: Probe) -> None:
    """The run's token ids would mean other words."""
    mine = probe.card.model
    with pytest.raises(RecordError, match="tokenizer"):
        require_sibling(probe, msgspec.structs.replace(mine, tokenizer_sha256="x"))
    tuned = msgspec.structs.replace(mine, weights_fingerprint="x", model_id="tuned")
    assert require_sibling(probe, tuned) == ("weights_fingerprint",)


@pytest.mark.parametrize(
    ("labels", "position", "message"),
    [
        ("other", "read", "fitted on other labels than"),
        ("mine", "write", "reads in the read pass, .* in the write pass"),
    ],
)
def test_the_run_must_be_that_of_the_probe(
    probe: Probe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    labels: str,
    position: str,
    message: str,
) -> None:
    """Another run may test what this probe was fitted on; features of another pass are noise."""
    training = {**probe.card.training, "labels_sha256": "mine"}
    card = msgspec.structs.replace(probe.card, training=training, position="read")
    mine = Probe(
        card, probe.layer, probe.neuron, probe.weight, probe.column_norm, probe.suppress, probe.bias
    )
    header = SimpleNamespace(model=card.model, labels_sha256=labels, position=position)
    data = SimpleNamespace(features=SimpleNamespace(header=header))
    monkeypatch.setattr("offline.transfer.load_dataset", lambda run: data)
    sibling = SimpleNamespace(identity=card.model)
    with pytest.raises(RecordError, match=message):
        transfer(mine, sibling, tmp_path, own=None)  # type: ignore[arg-type]
