"""Verb `inspect`: how the neurons of each layer share the FFN output, for one text.

Needs no run and no probe: what CETT looks like in a model before anything is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from offline.records import RecordError
from probes.neurons import find_ffns
from probes.tap import Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LayerShares(NamedTuple):
    """One layer; `shares` [neurons] is each neuron's CETT, averaged over the tokens of the text."""

    layer: int
    shares: Tensor
    maximum: float  # over neurons and tokens

    @property
    def mean(self) -> float:
        """Over neurons and tokens."""
        return float(self.shares.mean())

    @property
    def for_half(self) -> int:
        """The fewest neurons whose CETT adds up to half of the layer's."""
        return int((self.cumulative() < 0.5).sum()) + 1

    def cumulative(self) -> Tensor:
        """`[neurons]` share of the layer's CETT that its 1, 2, .. largest neurons hold."""
        largest_first = self.shares.double().sort(descending=True).values
        return largest_first.cumsum(0) / largest_first.sum()

    def top(self, count: int) -> list[tuple[int, float]]:
        """The neurons of the largest shares, `(neuron, share)`."""
        values, neurons = self.shares.topk(min(count, len(self.shares)))
        return list(zip(neurons.tolist(), values.tolist(), strict=True))


def inspect(
    model: PreTrainedModel, token_ids: Sequence[int], *, layer: int | None = None
) -> list[LayerShares]:
    """Every layer, or the one asked for. RecordError for an empty text or an unknown layer."""
    ffns = find_ffns(model)
    if layer is not None and not 0 <= layer < len(ffns):
        raise RecordError(f"layer {layer} is not one of 0 to {len(ffns) - 1}")
    if not token_ids:
        raise RecordError("the text has no tokens")
    found: list[LayerShares] = []

    def keep(number: int, cett: Tensor) -> None:
        rows = cett.reshape(-1, cett.shape[-1])
        found.append(LayerShares(number, rows.mean(dim=0).cpu(), float(rows.max())))

    chosen = ffns if layer is None else ffns[layer : layer + 1]
    with Recorder(chosen, on_layer=keep), torch.inference_mode():
        model(input_ids=torch.tensor([list(token_ids)], device=model.device), use_cache=False)
    return found


def table(layers: Sequence[LayerShares], *, top: int) -> str:
    """What is printed: one line per layer."""
    lines = ["layer   mean CETT  max CETT  neurons for half   largest (neuron: mean CETT)"]
    for one in layers:
        largest = ", ".join(f"{neuron}: {share:.3f}" for neuron, share in one.top(top))
        half = f"{one.for_half} of {len(one.shares)}"
        lines.append(f"{one.layer:>5}{one.mean:>12.4f}{one.maximum:>10.3f}{half:>18}   {largest}")
    return "\n".join(lines)


def plot(layers: Sequence[LayerShares], path: Path, *, title: str) -> None:
    """A picture (png, svg or pdf by its name): who carries the output, layer by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curves, extremes = figure.subplots(1, 2)
    for number, one in enumerate(layers):
        share = one.cumulative()
        across = torch.arange(1, len(share) + 1) / len(share)
        tone = f"C{number}" if len(layers) <= 10 else (0.1, 0.3, 0.6, 0.3)
        curves.plot(across, share, color=tone, label=f"layer {one.layer}")
    curves.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    curves.set(
        xlabel="share of the layer's neurons, largest first",
        ylabel="share of the layer's CETT",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    if len(layers) <= 10:
        curves.legend()
    numbers = [one.layer for one in layers]
    extremes.plot(numbers, [one.maximum for one in layers], "o-", label="maximum")
    extremes.plot(numbers, [one.mean for one in layers], "o-", label="mean")
    extremes.set(xlabel="layer", ylabel="CETT", yscale="log")
    extremes.legend()
    figure.suptitle(title)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as exc:
        raise RecordError(f"cannot write {path}: {exc}") from exc
