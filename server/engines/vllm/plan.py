"""What vLLM's workers have to read: the probes' neurons by layer, and what each request wants.

Knows no vLLM. The plan travels to the workers inside vLLM's configuration; an `Order` travels with
each request, inside its sampling parameters.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from probes.cett import FORMULA_VERSION
from probes.probe import Probe

EXTRA_ARGS_KEY = "hneurons"  # of an order among a request's `extra_args`


class Order(NamedTuple):
    """What one request wants from the meter."""

    probe: int  # index of the probe
    alpha: float
    contributors: int  # shares of single neurons in each reading
    whole_prompt: bool  # every prompt token is read, not the last one only

    @property
    def width(self) -> int:
        """Numbers per contribution and reading beside position and logits: layer, neuron, share."""
        return 3 * self.contributors


@dataclass(frozen=True, eq=False, kw_only=True)
class MeterPlan:
    """The probes of one model, their neurons laid end to end, each neuron once.

    With `suppression` the graph can scale the suppression sets; without it no column is written.
    """

    probes: tuple[Probe, ...]
    intermediate_size: int
    hidden_size: int
    suppression: bool
    ranks: int = 1  # of tensor parallelism

    def compute_hash(self) -> str:
        """What shapes the compiled graph, and nothing else.

        vLLM makes this part of the key under which it keeps compiled graphs. Which neurons are read
        is data: another probe of the same shape finds the same graph.
        """
        columns = int(torch.bincount(self.cells(self.ranks)).max())
        shape = (FORMULA_VERSION, self.layers, columns, len(self.probes), self.suppression)
        return hashlib.sha256(repr(shape).encode()).hexdigest()

    def cells(self, ranks: int) -> Tensor:
        """`[neurons]` int64: rank * layers + layer, of the layers that are read."""
        owner = self.neuron // (self.intermediate_size // ranks)
        layer = torch.searchsorted(torch.tensor(self.layers), self.layer)
        return owner * len(self.layers) + layer

    @cached_property
    def _flat(self) -> Tensor:
        """`[neurons]` int64, ascending: layer * width + neuron."""
        width = self.intermediate_size
        flat = [probe.layer * width + probe.neuron for probe in self.probes]
        return torch.tensor(sorted(set(torch.cat(flat).tolist())))

    @property
    def layer(self) -> Tensor:
        """`[neurons]` int64."""
        return self._flat // self.intermediate_size

    @property
    def neuron(self) -> Tensor:
        """`[neurons]` int64."""
        return self._flat % self.intermediate_size

    @cached_property
    def layers(self) -> list[int]:
        """The layers that are read, ascending."""
        return sorted(set(self.layer.tolist()))

    def rows_of(self, probe: Probe) -> Tensor:
        """Where the neurons of one of the probes lie among all."""
        return torch.searchsorted(self._flat, probe.layer * self.intermediate_size + probe.neuron)

    @cached_property
    def column_norm(self) -> Tensor:
        """`[neurons]` float32."""
        norms = torch.zeros(len(self._flat))
        for probe in self.probes:
            norms[self.rows_of(probe)] = probe.column_norm
        return norms

    @cached_property
    def weight(self) -> Tensor:
        """`[neurons, heads of all probes]` float32, one block per probe."""
        weight = torch.zeros(len(self._flat), self.heads)
        for index, probe in enumerate(self.probes):
            weight[self.rows_of(probe), self.head_slice(index)] = probe.weight
        return weight

    @cached_property
    def bias(self) -> Tensor:
        """`[heads of all probes]` float32."""
        return torch.cat([probe.bias for probe in self.probes])

    @cached_property
    def masks(self) -> Tensor:
        """`[probes, neurons]` float32: 1 in each probe's suppression set."""
        masks = torch.zeros(len(self.probes), len(self._flat))
        for index, probe in enumerate(self.probes):
            masks[index, self.rows_of(probe)] = probe.suppress.float()
        return masks

    @property
    def heads(self) -> int:
        return sum(len(probe.bias) for probe in self.probes)

    def head_slice(self, index: int) -> slice:
        """Where a probe's heads lie among all."""
        start = sum(len(probe.bias) for probe in self.probes[:index])
        return slice(start, start + len(self.probes[index].bias))

    def token_head(self, index: int) -> int:
        """The head whose shares are contributions."""
        probe = self.probes[index]
        return int(self.head_slice(index).start) + probe.head(probe.card.token.head)


@dataclass(frozen=True, eq=False)
class Layout:
    """The plan as one tensor-parallel rank sees it: the same number of columns in every layer.

    Neuron j lives on rank `j // (width / ranks)`. Layers with fewer neurons are padded with other
    columns, which nobody uses: equal shapes let vLLM compile one layer for all, and a column that
    stood there twice would be written twice (index_copy has no winner).

    columns  `[layers, K]` int64, local to the rank
    norms    `[layers, K]` float32, 0 where padded
    masks    `[layers, probes, K]` float32, 0 where padded
    flat     `[neurons]` int64: where each of the plan's neurons lies in `[ranks, layers, K]`
    """

    columns: Tensor
    norms: Tensor
    masks: Tensor
    flat: Tensor

    @classmethod
    def of(cls, plan: MeterPlan, *, rank: int, ranks: int) -> Layout:
        width = plan.intermediate_size // ranks
        owner, local = plan.neuron // width, plan.neuron % width
        cell = plan.cells(ranks)
        layer = cell % len(plan.layers)
        size = int(torch.bincount(cell).max())
        place = _place_in_run(cell)
        columns = torch.zeros(len(plan.layers), size, dtype=torch.int64)
        norms = torch.zeros(len(plan.layers), size)
        masks = torch.zeros(len(plan.layers), len(plan.probes), size)
        for index in range(len(plan.layers)):
            here = (owner == rank) & (layer == index)
            used = local[here]
            columns[index] = torch.cat([used, _unused(used, width)[: size - len(used)]])
            norms[index, : len(used)] = plan.column_norm[here]
            masks[index, :, : len(used)] = plan.masks[:, here]
        return cls(columns, norms, masks, cell * size + place)


def _place_in_run(cell: Tensor) -> Tensor:
    """How many earlier entries have the same value."""
    seen: dict[int, int] = {}
    places = []
    for value in cell.tolist():
        places.append(seen.get(value, 0))
        seen[value] = places[-1] + 1
    return torch.tensor(places)


def _unused(used: Tensor, width: int) -> Tensor:
    free = torch.ones(width, dtype=torch.bool)
    free[used] = False
    return free.nonzero().flatten()


def salt(plan: MeterPlan | None, order: Order | None, *, tenant: int) -> str | None:
    """Who may share cached keys and values; None: everybody who asks without API key at alpha 1.

    Under another alpha, or another suppression set, the keys and values of the same text differ.
    Between tenants they do not, but a prompt that is answered sooner tells that it is not new.
    """
    dose = None
    if plan is not None and order is not None and order.alpha != 1:
        dose = (plan.probes[order.probe].id, order.alpha)
    if dose is None and not tenant:
        return None
    return hashlib.sha256(repr((tenant, dose)).encode()).hexdigest()
