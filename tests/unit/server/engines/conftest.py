"""A tiny random Llama in a folder, probes for it, and engines that are closed after the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from probes.card import ModelIdentity
from probes.cett import column_norms
from probes.probe import Probe
from probes.random_probe import random_probe
from server.engines.base import GenerationRequest, Sampling, Step
from server.engines.loader import load_transformers_engine
from server.engines.transformers import TransformersEngine

VOCAB, LAYERS, WIDTH = 96, 2, 48


def make_tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """Weights large enough that tokens depend on the prompt."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and a tokenizer of one word per id, saved as a model folder."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_tiny_model().save_pretrained(folder)
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="w1", eos_token="w2", unk_token="w0", pad_token="w0"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def make_probe(identity: ModelIdentity, model: LlamaForCausalLM, *, name: str, seed: int) -> Probe:
    norms = torch.stack([column_norms(block.mlp.down_proj.weight) for block in model.model.layers])
    return random_probe(identity, norms.detach(), name=name, neurons=20, seed=seed, scale=3)


@pytest.fixture(scope="session")
def tiny_probes(tiny_folder: Path) -> tuple[Probe, Probe]:
    """Two probes of the tiny model, named `first` and `second`."""
    engine = load_transformers_engine(tiny_folder, model_id="tiny", device="cpu")
    asyncio.run(engine.aclose())
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    first, second = (
        make_probe(engine.card.identity, model, name=name, seed=seed)
        for seed, name in enumerate(("first", "second"))
    )
    return first, second


@pytest.fixture
async def make_engine(
    tiny_folder: Path, tiny_probes: tuple[Probe, Probe]
) -> AsyncIterator[Callable[..., TransformersEngine]]:
    """Engines over the tiny model; keyword arguments go to the loader."""
    made: list[TransformersEngine] = []

    def make(**options: Any) -> TransformersEngine:
        options = {"probes": tiny_probes, "device": "cpu", "prefix_tokens": 4096, **options}
        made.append(load_transformers_engine(tiny_folder, model_id="tiny", **options))
        return made[-1]

    yield make
    for engine in made:
        await engine.aclose()


@pytest.fixture(scope="session")
def request_of() -> Callable[..., GenerationRequest]:
    """`request_of(prompt, max_tokens, probe=..., temperature=...)`; endless unless told."""

    def make(prompt: Sequence[int], max_tokens: int = 8, **options: Any) -> GenerationRequest:
        fields = {"probe", "read_last", "alpha", "contributors"}
        sampling = {"temperature": 0.0, "ignore_eos": True}
        sampling |= {key: value for key, value in options.items() if key not in fields}
        return GenerationRequest(
            request_id="r",
            prompt_token_ids=tuple(prompt),
            max_tokens=max_tokens,
            sampling=Sampling(**sampling),
            **{key: value for key, value in options.items() if key in fields},
        )

    return make


@pytest.fixture(scope="session")
def collect() -> Callable[..., Any]:
    """All steps of a request."""

    async def run(engine: TransformersEngine, request: GenerationRequest) -> list[Step]:
        return [step async for step in engine.generate(request)]

    return run


@pytest.fixture(scope="session")
def eventually() -> Callable[..., Any]:
    """Wait until `condition()` holds; fails after `seconds`."""

    async def wait(condition: Callable[[], bool], seconds: float = 20) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)

    return wait
