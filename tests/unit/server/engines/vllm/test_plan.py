"""Which columns each rank reads, and where they lie once the ranks are put together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from probes.probe import Probe
from server.engines.vllm.plan import Layout, MeterPlan, Order, salt

WIDTH = 48


@pytest.fixture(scope="module")
def plan(tiny_probes) -> MeterPlan:
    """Two probes that share some neurons."""
    return MeterPlan(probes=tiny_probes, intermediate_size=WIDTH, hidden_size=32, suppression=True)


def cett_of(plan: MeterPlan, values: torch.Tensor, *, ranks: int) -> torch.Tensor:
    """What the workers make of `values` `[layers, neurons]`: their columns, put together."""
    parts = []
    for rank in range(ranks):
        layout = Layout.of(plan, rank=rank, ranks=ranks)
        mine = values.reshape(len(values), ranks, -1)[:, rank]
        parts.append(mine.gather(1, layout.columns) * layout.norms)
    return torch.stack(parts).flatten()[layout.flat]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_probe_reads_its_own_neurons(plan, tiny_probes, ranks):
    """A neuron on the wrong rank, in the wrong layer or with another's weight is a wrong risk."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2, WIDTH, generator=generator)
    cett = cett_of(plan, values, ranks=ranks)
    logits = cett @ plan.weight + plan.bias
    for index, probe in enumerate(tiny_probes):
        expected = (values[probe.layer, probe.neuron] * probe.column_norm) @ probe.weight
        assert torch.allclose(logits[plan.head_slice(index)], expected + probe.bias, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_no_column_stands_twice_and_padding_does_nothing(plan, ranks):
    """index_copy has no winner among duplicates; padded columns must not be scaled."""
    suppressed = torch.zeros(len(plan.probes), ranks, 2, WIDTH // ranks)
    for rank in range(ranks):
        layout = Layout.of(plan, rank=rank, ranks=ranks)
        for layer, columns in enumerate(layout.columns):
            assert len(set(columns.tolist())) == len(columns)
            suppressed[:, rank, layer, columns] = layout.masks[layer]
    whole = suppressed.transpose(1, 2).reshape(len(plan.probes), 2, WIDTH)
    for index, probe in enumerate(plan.probes):
        expected = torch.zeros(2, WIDTH)
        expected[probe.layer[probe.suppress], probe.neuron[probe.suppress]] = 1
        assert torch.equal(whole[index], expected)


def test_the_compiled_graph_is_shared_by_probes_of_one_shape(plan, tiny_probes):
    """The hash is part of vLLM's key for compiled graphs: it tells shapes apart, not neurons."""
    first = tiny_probes[0]
    moved = replace(
        plan,
        probes=tuple(
            _placed(probe, probe.layer * WIDTH + (probe.neuron + 7) % WIDTH)
            for probe in tiny_probes
        ),
    )
    assert moved.neuron.tolist() != plan.neuron.tolist()
    assert moved.compute_hash() == plan.compute_hash()
    assert replace(plan, suppression=False).compute_hash() != plan.compute_hash()
    assert replace(plan, probes=(first,)).compute_hash() != plan.compute_hash()


def _placed(probe: Probe, flat: torch.Tensor) -> Probe:
    """The same numbers at other neurons."""
    ascending = flat.sort().values
    return replace(probe, layer=ascending // WIDTH, neuron=ascending % WIDTH)


def test_the_hash_tells_apart_how_many_columns_a_rank_has(plan, tiny_probes):
    """Split over ranks, neurons of one layer may all lie on one of them, or not."""
    first = tiny_probes[0]
    rows = torch.arange(len(first.layer))  # all in layer 0
    crowded = replace(plan, probes=(_placed(first, rows),), ranks=2)
    halves = rows % 2 * (WIDTH // 2) + rows // 2
    spread = replace(plan, probes=(_placed(first, halves),), ranks=2)
    assert crowded.compute_hash() != spread.compute_hash()
    assert replace(crowded, ranks=1).compute_hash() == replace(spread, ranks=1).compute_hash()


def test_the_salt_tells_suppressed_caches_apart(plan):
    """I4: keys of one alpha must never serve another; at alpha 1 everybody shares."""
    orders = [Order(p, alpha, 0, whole_prompt=False) for p in (0, 1) for alpha in (0.0, 0.5, 2.0)]
    assert len({salt(plan, order, tenant=0) for order in orders}) == len(orders)
    more = orders[0]._replace(contributors=3)
    assert salt(plan, orders[0], tenant=0) == salt(plan, more, tenant=0)
    assert salt(plan, Order(0, 1.0, 0, whole_prompt=False), tenant=0) is None


def test_the_salt_tells_tenants_apart(plan):
    """A prompt that is answered sooner tells that somebody has asked it before."""
    plain, dosed = Order(0, 1.0, 0, whole_prompt=False), Order(0, 0.0, 0, whole_prompt=False)
    salts = {
        salt(*asked, tenant=tenant)
        for asked in ((None, None), (plan, plain), (plan, dosed))
        for tenant in (0, 1, 2)
    }
    assert len(salts) == 6, "with or without a probe, at alpha 1 the keys and values are the same"


def test_contributions_come_from_the_token_head(plan, tiny_probes: tuple[Probe, ...]):
    """The second probe's heads lie behind the first's."""
    assert [plan.token_head(0), plan.token_head(1)] == [0, 2]
    assert plan.heads == 4
