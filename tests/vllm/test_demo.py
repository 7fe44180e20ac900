"""The demo model with the probe that ships, compiled, in bfloat16: what users run, under pressure.

The logits of this probe spread by little more than .1, and a token's differs from its neighbour's
by .09 in the middle: the limit of .03 sees a mistaken row only among many, so a mutant shows it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from probes.probe import Probe
from tests.contract.oracle import LIMIT, reference_of
from tests.vllm.served import Served, mixed_requests

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROBE = "smollm2-135m-instruct"
LENGTHS = (5, 7, 9, 12, 16, 20, 26, 33, 500)
# 20 blocks of 32 tokens: one long prompt and its answer, or a few short ones.
SQUEEZED = "--max-num-batched-tokens 256 --block-size 32 --num-gpu-blocks-override 21"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def demo(start_engine, demo_model_path, repository) -> AsyncIterator[Served]:
    reference = reference_of(demo_model_path, "model.layers.{}.mlp.down_proj", transposed=False)
    probe = Probe.load(repository / "probes" / "fitted" / PROBE)
    engine = start_engine(
        demo_model_path,
        [probe],
        max_num_seqs=32,
        max_model_len=600,
        max_waiting_requests=300,
        vllm_args=SQUEEZED,
    )
    yield Served(engine, reference, [probe])
    await engine.aclose()


@pytest.fixture(scope="module")
def text(demo, repository) -> list[int]:
    return demo.engine.tokenizer((repository / "LICENSE").read_text()).input_ids


async def test_two_hundred_mixed_requests_read_what_the_reference_reads(demo, text):
    """Real weights, English text, 32 in flight; blocks are given up, prefixes found, clients go."""
    requests = mixed_requests(200, text, lengths=LENGTHS, tokens=16, probes=(PROBE,))
    assert await demo.worst(requests, leaving=requests[::10], scoring=False) <= LIMIT["bfloat16"]
    assert await demo.inside("resumed") > 0, "nothing was preempted"
    assert demo.engine.health().cached_tokens_total > 0, "no prefix was found"
    assert demo.engine.health().running == 0


async def test_swapped_rows_turn_the_same_check_red(demo, text):
    """A limit of .03 must see them."""
    requests = mixed_requests(12, text, lengths=LENGTHS[:4], tokens=8, probes=(PROBE,))
    assert await demo.worst(requests, scoring=False) <= LIMIT["bfloat16"]
    await demo.inside("mutate", "readings of neighbours")
    with pytest.raises(AssertionError):
        assert await demo.worst(requests, scoring=False) <= LIMIT["bfloat16"]
    await demo.inside("heal")
