"""Tensor and pipeline parallelism: two workers, each with half of the columns, or of the layers,
read what one does."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import pytest_asyncio
import transformers as hf

from probes.errors import ModelError
from server.engines.base import Sampling
from tests.contract.oracle import IDS, LIMIT, Family, families, make_requests, random_prompts
from tests.vllm.served import TRACED, Served, mixed_requests

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = random_prompts()[2] * 3
TWO = "--tensor-parallel-size 2"
STAGES = "--pipeline-parallel-size 2"


@asynccontextmanager
async def served(start_engine, make_model, ranks: str) -> AsyncIterator[Served]:
    """The tiny Llama by several workers; how their threads are bound is left to the loader."""
    folder, reference, probes = make_model(families(128, head_dim=32)["llama"], "float32")
    words = f"{ranks} {TRACED} --max-num-batched-tokens 64 --block-size 32"
    options = {"max_num_seqs": 32, "max_waiting_requests": 100, "vllm_args": words}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_CPU_OMP_THREADS_BIND")
        patch.delenv("OMP_NUM_THREADS")  # vLLM's own way of binding wants two NUMA nodes
        engine = start_engine(folder, probes, **options)
    yield Served(engine, reference, probes)
    await engine.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ranks(start_engine, make_model) -> AsyncIterator[Served]:
    async with served(start_engine, make_model, TWO) as two:
        yield two


async def test_two_ranks_read_what_the_reference_reads(ranks):
    """A column of the wrong rank, an h that is not summed yet, a dose that only one rank has."""
    requests = mixed_requests(60, TEXT, lengths=(5, 17, 40, 90), tokens=20)
    assert await ranks.worst(requests, leaving=requests[::10]) <= LIMIT["float32"]
    await ranks.inside("mutate", "columns of another rank")
    with pytest.raises(AssertionError):
        assert await ranks.worst(requests[:6]) <= LIMIT["float32"]
    await ranks.inside("heal")


async def test_contributions_come_from_both_ranks(ranks):
    """Each with its global address; together they make the logit."""
    await ranks.check_contributions()


async def test_a_pass_that_nobody_reads_gathers_nothing(ranks):
    """vLLM's all-gather divides by the number of values: none of them would end the worker."""
    request = replace(make_requests(random_prompts(), 5)[1], probe=None, alpha=1.0)
    request = replace(request, sampling=Sampling(temperature=0))
    assert all(step.reading is None for step in await ranks.generate(request))
    assert ranks.engine.health().alive


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[STAGES, f"{STAGES} {TWO}"])
async def stages(request, start_engine, make_model) -> AsyncIterator[Served]:
    async with served(start_engine, make_model, request.param) as two:
        yield two


async def test_two_stages_read_what_the_reference_reads(stages):
    """Two passes are on their way at a time: readings of the first stage could meet the other."""
    requests = mixed_requests(60, TEXT, lengths=(5, 17, 40, 90), tokens=20)
    assert await stages.worst(requests, leaving=requests[::10]) <= LIMIT["float32"]
    mutants = ("another pass of", "nothing from")
    for mutant in (*(f"{name} the stage before" for name in mutants), "row order swapped"):
        await stages.inside("mutate", mutant)
        with pytest.raises(AssertionError):
            assert await stages.worst(requests[:12]) <= LIMIT["float32"]
        await stages.inside("heal")


async def test_readings_that_do_not_come_from_the_stage_before_are_no_readings(stages):
    """Not zeros: a risk made of half of the neurons would look like any other."""
    request = replace(make_requests(random_prompts(), 5)[1], probe="one")
    await stages.inside("mutate", "nothing from the stage before")
    steps = await stages.generate(request)
    await stages.inside("heal")
    read = [step.reading for step in steps if step.reading is not None]
    assert read
    assert all(math.isnan(reading.logits[0]) for reading in read)


async def test_contributions_come_from_both_stages(stages):
    await stages.check_contributions()


async def test_a_layer_that_puts_out_a_partial_sum_is_refused(start_engine, make_model):
    """Parallel attention: h is summed later, together with what attention gives."""

    def config() -> hf.PretrainedConfig:
        return hf.CohereConfig(
            **IDS,
            hidden_size=128,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )

    family = Family(config, "model.layers.{}.mlp.down_proj")
    folder, _, probes = make_model(family, "float32")
    with pytest.raises(ModelError, match="partial sum under tensor parallelism"):
        start_engine(folder, probes, vllm_args=TWO)
