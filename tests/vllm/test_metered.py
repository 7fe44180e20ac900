"""The graph that a server has by default: the meter, and nothing that scales."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from tests.contract.oracle import LIMIT, families, random_prompts
from tests.vllm.served import Served, mixed_requests

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = random_prompts()[2] * 3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llama(start_engine, make_model) -> AsyncIterator[Served]:
    """A float32 Llama, compiled by Inductor, without suppression."""
    folder, reference, probes = make_model(families(128, head_dim=32)["llama"], "float32")
    words = "--max-num-batched-tokens 64 --block-size 32"
    engine = start_engine(folder, probes, max_num_seqs=32, suppression=False, vllm_args=words)
    yield Served(engine, reference, probes)
    await engine.aclose()


async def test_readings_are_those_of_the_reference(llama):
    """Every other test has the graph that can scale."""
    assert llama.engine._llm.vllm_config.compilation_config.backend == "inductor"
    requests = mixed_requests(80, TEXT, lengths=(5, 17, 40, 90, 300), tokens=30)
    plain = [replace(request, alpha=1.0) for request in requests]
    assert await llama.worst(plain, leaving=plain[::10]) <= LIMIT["float32"]


async def test_alpha_is_refused(llama):
    """The columns cannot be written: a request that was served at alpha 1 would not know."""
    request = replace(mixed_requests(1, TEXT, lengths=(5,), tokens=4)[0], alpha=0.5)
    with pytest.raises(ValueError, match="made without suppression"):
        await llama.generate(request)
