"""Our formula gives the paper's numbers on the same activations.

The golden numbers were computed once, in float64, by an independent script that follows the paper's
definition (H-Neurons, arXiv 2512.01797, section 2) and shares no code with `probes`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from probes.cett import cett, column_norms, h_norm
from probes.neurons import find_ffns
from probes.tap import Recorder

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "reference_cett.json").read_text())
# bf16 inputs are rounded to 8 bits, a relative error of up to 2**-8 in z, in each norm and in h.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.02}


def _tensor(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(GOLDEN[name], dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formula_gives_the_papers_numbers(dtype: torch.dtype, transposed: bool) -> None:
    """A norm over rows instead of columns, or of the residual stream, still looks plausible."""
    z = _tensor("z", dtype)
    weight = _tensor("weight", dtype)
    stored = weight.T.contiguous() if transposed else weight
    h = (_tensor("z") @ _tensor("weight").T).to(dtype)
    found = cett(z, column_norms(stored, transposed=transposed), h_norm(h).unsqueeze(-1))
    assert found.dtype == torch.float32
    _compare(found, "cett_without_bias", TOLERANCE[dtype])


@pytest.mark.parametrize("layer", ["Linear", "Linear without bias", "Conv1D"])
def test_recorder_gives_the_papers_numbers(layer: str) -> None:
    """h is what the layer puts out, bias included, and Conv1D stores its weight transposed."""
    weight = _tensor("weight", torch.float32)
    hidden, neurons = weight.shape
    if layer == "Conv1D":
        down: nn.Module = Conv1D(hidden, neurons)
        down.weight.data = weight.T.contiguous()
    else:
        down = nn.Linear(neurons, hidden, bias=layer == "Linear")
        down.weight.data = weight
    if down.bias is not None:
        down.bias.data = _tensor("bias", torch.float32)
    model = nn.Module()
    model.h = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"c_proj": down})})])
    model.config = SimpleNamespace(num_hidden_layers=1, hidden_size=hidden, vocab_size=2)
    with torch.no_grad(), Recorder(find_ffns(model)) as recorder:
        down(_tensor("z", torch.float32)[None])
        found = recorder.cett(0)[0]
    expected = "cett_without_bias" if layer == "Linear without bias" else "cett_with_bias"
    _compare(found, expected, 2e-6)  # the layer's own product is float32 too


def _compare(found: Tensor, golden: str, tolerance: float) -> None:
    torch.testing.assert_close(found.double(), _tensor(golden), rtol=tolerance, atol=1e-9)
