"""Other model families, and two tensor-parallel processes, each from a tiny random checkpoint.

Traced by Dynamo like any other, but not compiled by Inductor: so many compilations would take CI a
quarter of an hour. tests/vllm/test_parity.py compiles.
"""

from __future__ import annotations

import pytest

from probes.errors import ModelError
from tests.contract.oracle import LIMIT, families, make_requests, random_prompts
from tests.vllm.served import Served

FAMILIES = families(128, head_dim=32)
CHUNKS = "--max-num-batched-tokens 64"


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")


# gpt_neox runs on vLLM's Transformers backend.
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "phi3", "gpt2", "opt", "gpt_neox"])
async def test_readings_equal_the_formula(start_engine, make_model, name):
    """Biases, Conv1D, norms after the FFN, flattened rows, another backend: the same readings."""
    folder, reference, probes = make_model(FAMILIES[name], "float32")
    engine = start_engine(folder, probes, vllm_args=CHUNKS)
    try:
        worst = await Served(engine, reference, probes).worst(make_requests(random_prompts(), 5))
    finally:
        await engine.aclose()
    assert worst <= LIMIT["float32"]


async def test_two_processes_read_what_one_reads(start_engine, make_model):
    """Each holds half of the neurons: a column of the other rank, or a sum taken twice."""
    folder, reference, probes = make_model(FAMILIES["llama"], "float32")
    engine = start_engine(folder, probes, vllm_args=f"{CHUNKS} --tensor-parallel-size 2")
    try:
        worst = await Served(engine, reference, probes).worst(make_requests(random_prompts(), 5))
    finally:
        await engine.aclose()
    assert worst <= LIMIT["float32"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--enforce-eager", "--enforce-eager"),
        ("--pipeline-parallel-size 2", "--pipeline-parallel-size"),
        ("--enable-lora", "--enable-lora"),
        ("--data-parallel-size 2", "--data-parallel-size"),
        ("--stream-interval 4", "--stream-interval"),
        (
            """--speculative-config '{"method": "ngram", "num_speculative_tokens": 2, """
            """"prompt_lookup_max": 3}'""",
            "--speculative-config",
        ),
        ("--no-such-option", "no-such-option"),
    ],
)
def test_what_is_not_proven_is_refused_by_name(start_engine, make_model, arguments, reason):
    """A reading of the wrong token, silently, is worse than no start."""
    folder, _, probes = make_model(FAMILIES["llama"], "float32")
    with pytest.raises(ModelError, match=reason):
        start_engine(folder, probes, vllm_args=arguments)


def test_a_probe_of_other_columns_does_not_start(start_engine, make_model, monkeypatch):
    """The last check before readings: the loaded layer's own columns, asked for with one-hot rows.

    The checkpoint's identity is right here, as it would be if vLLM had loaded something else.
    """
    folder, _, probes = make_model(FAMILIES["llama"], "float32")
    for probe in probes:
        probe.column_norm.mul_(1.01)
    with pytest.raises(ModelError, match="vLLM did not start"):
        start_engine(folder, probes)
