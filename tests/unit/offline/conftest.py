"""A byte-level tokenizer, a tiny random Llama, and answers made of text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from offline.records import Answer, Header
from server.engines.fake_model import IM_END, VOCAB_SIZE, fake_tokenizer

MakeAnswer = Callable[..., Answer]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return fake_tokenizer()


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    """Random, 3 layers of 24 neurons, bfloat16 as real checkpoints are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture
def make_answer(tokenizer: PreTrainedTokenizerFast) -> MakeAnswer:
    def make(
        text: str = "The capital of Poland is Warsaw.",
        question: str = "The capital of Poland is",
        gold: tuple[str, ...] = ("Warsaw",),
        *,
        id: str = "set/complete/q1/0",
        group: str = "capital of",
        source: str = "set",
        split: str = "",
    ) -> Answer:
        return Answer(
            id=id,
            source=source,
            style=id.split("/")[1],
            group=group,
            question=question,
            prompt=question,
            gold=gold,
            split=split,
            prompt_token_ids=tuple(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}],
                    add_generation_prompt=True,
                    return_dict=False,
                )
            ),
            token_ids=(*tokenizer.encode(text), IM_END),
            text=text,
            finish_reason="stop",
        )

    return make


@pytest.fixture
def header() -> Header:
    return Header(
        kind="answers",
        model_id="tiny",
        tokenizer_sha256="t",
        chat_template_sha256="c",
        settings={"samples": "1"},
        libraries={},
    )
