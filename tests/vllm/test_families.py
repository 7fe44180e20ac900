"""Dense families of other shapes read right inside vLLM's graph; the rest is refused by name.

Each engine compiles for itself.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import transformers as hf

from probes.errors import ModelError
from tests.contract.oracle import LIMIT, families, make_requests, random_prompts
from tests.vllm.served import Served

FAMILIES = families(128, head_dim=32)
# Llama is in test_parity. gemma3 normalises after the FFN and has windows, phi3 fuses gate and up,
# gpt2 and opt have biases and no gate, olmo2 is a model of transformers inside vLLM.
READ = ("qwen3", "gemma3", "phi3", "gpt2", "opt", "olmo2")
SMALL = "--max-num-batched-tokens 64 --block-size 32"


@pytest.mark.parametrize("name", READ)
async def test_a_family_reads_and_writes_what_its_reference_does(name, start_engine, make_model):
    """A wrong layer, column, mask, position or order of suppression; prompts in several chunks."""
    folder, reference, probes = make_model(FAMILIES[name], "float32")
    engine = start_engine(folder, probes, vllm_args=SMALL)
    try:
        requests = make_requests(random_prompts(), 5)
        assert await Served(engine, reference, probes).worst(requests) <= LIMIT["float32"]
    finally:
        await engine.aclose()


async def test_a_model_that_vllm_does_not_compile_is_refused(start_engine, make_model):
    """The sentence comes from a worker, whose parent learns only that it did not start."""

    def with_dynamic_rope() -> hf.PretrainedConfig:
        config = FAMILIES["olmo2"].config()
        rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 1.0}
        config.update({"rope_parameters": rope})
        return config

    family = replace(FAMILIES["olmo2"], config=with_dynamic_rope)
    folder, _, probes = make_model(family, "float32")
    with pytest.raises(ModelError, match=r"does not compile the part of .* that holds .*down_proj"):
        start_engine(folder, probes)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("--quantization fp8", "quantization"),
        ('--quantization-config \'{"linear": "fp8_per_channel"}\'', "--quantization-config|fp8"),
        ("--worker-extension-cls os.path", "--worker-extension-cls is refused"),
        ('--model-class-overrides \'{"LlamaForCausalLM": "a:B"}\'', "--model-class-overrides"),
        ("--enforce-eager", "--enforce-eager"),
        ("--nnodes 2 --master-addr 127.0.0.1", "--nnodes"),
        (
            "--pipeline-parallel-size 2 --speculative-config "
            '\'{"method": "ngram", "num_speculative_tokens": 2}\'',
            "--speculative-config with --pipeline-parallel-size",
        ),
        ("--data-parallel-size 2", "--data-parallel-size"),
        ("--enable-lora", "--enable-lora"),
        ("--stream-interval 2", "--stream-interval"),
        ("--dtype=bfloat16", "--dtype is refused: give --dtype to this server"),
        ("--max_num_seqs 4", "--max-num-seqs is refused"),
        ("--max-num-queued-tokens 9", "give --max-waiting-tokens to this server"),
        ("--max-logprobs 5", "--max-logprobs is refused: this server sets it"),
        ("--served-model-name x", "give --served-model-name to this server"),
        ("--trust-remote-code", "--trust-remote-code is refused"),
        ("--override-generation-config '{\"top_k\": 5}'", "--override-generation-config"),
        (
            '--kv-transfer-config \'{"kv_connector": "OffloadingConnector", '
            '"kv_role": "kv_both"}\'',
            "--kv-transfer-config",
        ),
        ("--logprobs-mode processed_logprobs", "--logprobs-mode"),
        ("--hf-overrides '{\"rope_theta\": 5}'", "--hf-overrides"),
        (
            '--speculative-config \'{"method": "ngram_gpu", "num_speculative_tokens": 2}\'',
            "--speculative-config with another method than",
        ),
        (
            '--speculative-config \'{"method": "ngram", "num_speculative_tokens": 2, '
            '"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2}\'',
            "another rejection_sample_method",
        ),
    ],
)
async def test_what_changes_rows_layers_or_weights_is_refused(
    words, option, start_engine, make_model
):
    """Before any process starts, and by the option's name."""
    folder, _, probes = make_model(FAMILIES["llama"], "float32")
    with pytest.raises(ModelError, match=option):
        start_engine(folder, probes, vllm_args=words)


async def test_a_quantised_checkpoint_is_refused(start_engine, make_model):
    """Its columns are not those that the probe was fitted on, to a degree that nobody measured."""
    folder, _, probes = make_model(FAMILIES["llama"], "float32")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is quantised \(fp8\)"):
        start_engine(folder, probes)
