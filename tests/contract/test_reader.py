"""Extraction reads every family as a pass over each answer alone does, shared prompts or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from offline.reader import Ids, Position, Reader, Rows, Text, common_start
from probes.cett import cett, h_norm
from probes.neurons import find_ffns

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 97,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "vocab_size": 97}
FAMILIES: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**SIZES, num_key_value_heads=2),
    "sliding window": lambda: hf.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=6),
    "window of some layers": lambda: hf.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, sliding_window=6
    ),
    "learned positions": lambda: hf.GPT2Config(**GPT2),
    "flattened batch": lambda: hf.OPTConfig(
        **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
        ffn_dim=48,
        word_embed_proj_dim=32,
    ),
    "alibi": lambda: hf.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=97),
}


def texts() -> list[Text]:
    """Six answers to four prompts; two prompts have two answers, all begin alike."""
    generator = torch.Generator().manual_seed(3)

    def some(count: int) -> Ids:
        return tuple(torch.randint(3, 80, (count,), generator=generator).tolist())

    start = some(5)
    prompts = [start + some(count) for count in (1, 2, 9, 4)]
    lengths = ((0, 3), (1, 7), (1, 2), (2, 5), (3, 1), (3, 9))
    return [Text(prompts[prompt], some(length)) for prompt, length in lengths]


def alone(model: nn.Module, text: Text) -> tuple[Tensor, Tensor, Tensor]:
    """CETT, hidden states of layer 2 and log-probabilities of a pass over this text by itself."""
    ids = torch.tensor([text.prompt + text.written])
    kept: list[Tensor] = []
    handles = []
    for ffn in find_ffns(model):

        def keep(module: nn.Module, args: tuple[Tensor, ...], out: Tensor, norms: Tensor) -> None:
            z, h = (part.reshape(ids.shape[1], -1) for part in (args[0], out))
            kept.append(cett(z, norms, h_norm(h).unsqueeze(-1)))

        norms = ffn.column_norms()
        handles.append(
            ffn.module.register_forward_hook(lambda m, a, o, n=norms, k=keep: k(m, a, o, n))
        )
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    predicted = output.logits[0].log_softmax(-1)[len(text.prompt) - 1 : -1]
    logprobs = predicted[torch.arange(len(text.written)), list(text.written)]
    return torch.cat(kept, dim=-1), output.hidden_states[2][0], logprobs


def read(model: nn.Module, batch: Sequence[Text], *, position: Position, shared: Ids) -> Rows:
    reader = Reader(
        model,
        position=position,
        residual_layers=(2,),
        shared=shared,
        longest=max(len(text.prompt) + len(text.written) for text in batch),
    )
    rows = reader.empty(sum(len(text.written) for text in batch), torch.float32)
    reader.read(batch, rows)
    return rows


@pytest.mark.parametrize("position", ["read", "write"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_reads_as_if_each_answer_had_its_own(
    family: str, position: Position
) -> None:
    """Prompts are read once and handed on. A cache of another prompt, a position counted over
    padding or a window that counts a gap gives features of a text that nobody wrote."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()
    batch = texts()
    rows = read(
        model, batch, position=position, shared=common_start([text.prompt for text in batch])
    )
    row = 0
    for text in batch:
        here = slice(row, row + len(text.written))
        start = len(text.prompt) - (position == "write")
        there = slice(start, start + len(text.written))
        expected, residual, logprob = alone(model, text)
        assert torch.allclose(rows.cett[here], expected[there], rtol=2e-4, atol=1e-6)
        assert torch.allclose(rows.residual[here, 0], residual[there], rtol=1e-4, atol=1e-5)
        assert torch.allclose(rows.logprob[here], logprob, atol=1e-5)
        row = here.stop


def test_the_last_token_of_a_prompt_is_never_shared() -> None:
    """It predicts the first written token, whose log-probability would otherwise be missing."""
    assert common_start([(1, 2, 3), (1, 2, 3)]) == (1, 2)
    assert common_start([(1, 2, 3), (1, 5, 3)]) == (1,)
    assert common_start([(1,), (1, 2)]) == ()
