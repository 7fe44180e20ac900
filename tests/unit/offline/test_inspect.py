"""`inspect`: the figures of a layer, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from offline.inspect import LayerShares, inspect, plot, table
from offline.records import RecordError
from probes.neurons import find_ffns
from probes.tap import Recorder

TEXT = (72, 101, 108, 108, 111)


def test_the_fewest_neurons_that_carry_half() -> None:
    """Largest first: 4 of 8 is one neuron, 3 + 2 of 8 are two; by number they were four."""
    assert LayerShares(0, torch.tensor([1.0, 1.0, 2.0, 4.0]), 1.0).for_half == 1
    assert LayerShares(0, torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0]), 1.0).for_half == 2
    assert LayerShares(0, torch.ones(10), 1.0).for_half == 5


def test_figures_are_those_of_the_recorder(tiny_model: LlamaForCausalLM) -> None:
    layers = inspect(tiny_model, TEXT)
    with Recorder(find_ffns(tiny_model)) as recorder, torch.inference_mode():
        tiny_model(torch.tensor([TEXT]))
        for found in layers:
            cett = recorder.cett(found.layer)[0]
            assert found.mean == pytest.approx(float(cett.mean()), rel=1e-5)
            assert found.maximum == pytest.approx(float(cett.max()))
            best = int(cett.mean(dim=0).argmax())
            assert found.top(1) == [(best, pytest.approx(float(cett[:, best].mean())))]
    assert [found.layer for found in layers] == [0, 1, 2]


def test_one_layer_is_read_alone(tiny_model: LlamaForCausalLM) -> None:
    (found,) = inspect(tiny_model, TEXT, layer=1)
    assert found.shares.tolist() == inspect(tiny_model, TEXT)[1].shares.tolist()
    with pytest.raises(RecordError, match="0 to 2"):
        inspect(tiny_model, TEXT, layer=3)
    with pytest.raises(RecordError, match="no tokens"):
        inspect(tiny_model, ())


def test_table_and_picture_show_every_layer(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    layers = inspect(tiny_model, TEXT)
    lines = table(layers, top=2).splitlines()
    assert len(lines) == 4
    assert f"{layers[2].for_half} of 24" in lines[3]
    plot(layers, tmp_path / "shares.svg", title="tiny")
    text = (tmp_path / "shares.svg").read_text()
    assert "<svg" in text
    with pytest.raises(RecordError, match="cannot write"):
        plot(layers, tmp_path / "shares.doc", title="tiny")
