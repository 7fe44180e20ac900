"""A row in a batch computes what it computes alone, whatever comes, goes and moves around it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as hf

from server.engines.attention import BLOCK, NAME, attend, use_batch_attention
from server.engines.cache import COLUMN_STEP
from server.engines.forward import Forward, Tap

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPS = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 512}
OLD = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
WINDOW = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
GPT2 = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4}

FAMILIES: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**GROUPS),
    "mistral": lambda: hf.MistralConfig(**GROUPS, sliding_window=16),
    "qwen2": lambda: hf.Qwen2Config(**GROUPS),
    "qwen3": lambda: hf.Qwen3Config(**GROUPS, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**GROUPS, **WINDOW, attn_logit_softcapping=2.0),
    "gemma3": lambda: hf.Gemma3TextConfig(**{**GROUPS, **WINDOW, "num_hidden_layers": 7}),
    "phi3": lambda: hf.Phi3Config(**GROUPS),
    "olmo2": lambda: hf.Olmo2Config(**GROUPS),
    "gpt2": lambda: hf.GPT2Config(vocab_size=128, **GPT2),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SIZES, max_position_embeddings=512),
    "opt": lambda: hf.OPTConfig(**OLD, ffn_dim=48, word_embed_proj_dim=32),
    "falcon": lambda: hf.FalconConfig(**OLD),
    "falcon_alibi": lambda: hf.FalconConfig(**OLD, alibi=True),
    "bloom": lambda: hf.BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4),
}
TAP = Tap()


def make_model(family: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (count,), generator=generator).tolist()


def assert_as_alone(logits: torch.Tensor, model: torch.nn.Module, rows: list[list[int]]) -> None:
    alone = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
    assert (logits - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_come_and_go_compute_what_they_compute_alone(family):
    """Wrong position, mask, window or alibi of a padded row (0.53 of risk, measured)."""
    plain = make_model(family)
    model = copy.deepcopy(plain)
    use_batch_attention(model)
    if family == "gemma2":
        plain.set_attn_implementation("eager")  # the library's sdpa leaves the cap out
    forward = Forward(model, None)
    prompts = [random_tokens(count, seed) for seed, count in enumerate((50, 1, 7, 33))]
    with torch.inference_mode():
        read = forward.new_cache(4)
        logits = forward(prompts, read, [TAP] * 4)
        assert_as_alone(logits, plain, prompts)
        chunked = forward.new_cache(2)
        for start in range(0, 50, 20):  # the chunks of a long prompt
            logits = forward([prompts[0][start : start + 20]] * 2, chunked, [TAP] * 2)
        assert_as_alone(logits, plain, [prompts[0]] * 2)

        cache = forward.new_cache()
        cache.admit(read, 1)
        cache.admit(read, 2)
        rows = [list(prompts[1]), list(prompts[2])]
        for step in range(24):
            if step == 5:  # longer than all that is stored
                cache.admit(chunked, 1)
                cache.admit(read, 3)
                rows += [list(prompts[0]), list(prompts[3])]
            if step in (9, 14):  # the longest leaves, the last takes its place
                longest = max(range(len(rows)), key=lambda row: len(rows[row]))
                cache.retire(longest)
                rows[longest] = rows[-1]
                rows.pop()
            for row, token in zip(rows, random_tokens(len(rows), 100 + step), strict=True):
                row.append(token)
            logits = forward([row[-1:] for row in rows], cache, [TAP] * len(rows))
            assert cache.lengths == [len(row) for row in rows]
            if step % 4 == 1:
                assert_as_alone(logits, plain, rows)


def test_buffers_hold_no_more_than_rows_can():
    """One long prompt made every row half as long again as the context, for good."""
    model = make_model("llama")
    forward = Forward(model, None, longest=410)
    with torch.inference_mode():
        read = forward.new_cache(1)
        forward([random_tokens(400, 0)], read, [TAP])
        cache = forward.new_cache()
        cache.admit(read, 0)
        assert cache.states(0)[0][0].shape[1] == 400
        assert (
            cache._layers[0].keys.shape[2] == 512
        )  # 410, in steps of 256; half as much again is 768


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("masked", ["added", "bool", "causal"])
def test_capped_scores_are_those_of_gemma(tokens, masked):
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    torch.manual_seed(1)
    query, key, value = (
        3 * torch.randn(3, heads, n, 8) for heads, n in ((6, tokens), (2, 9), (2, 9))
    )
    allowed = torch.ones(3, 1, tokens, 9, dtype=torch.bool).tril(9 - tokens)
    if masked != "causal":
        allowed &= torch.rand(3, 1, tokens, 9) > 0.3
        allowed[..., 0] = True
    added = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    module = torch.nn.Module().eval()
    module.num_key_value_groups, module.head_dim = 3, 8
    expected, _ = eager_attention_forward(
        module, query, key, value, added, softcap=2.0, scaling=0.3
    )
    mask = {"added": added, "bool": allowed, "causal": None}[masked]
    found, _ = attend(module, query, key, value, mask, softcap=2.0, scaling=0.3)
    torch.testing.assert_close(found, expected)


def test_grouped_attention_is_used_where_heads_share_keys():
    """The fast path silently unused would only show as lost throughput."""
    model = make_model("llama")
    use_batch_attention(model)
    assert model.config._attn_implementation == NAME
    bloom = make_model("bloom")
    use_batch_attention(bloom)
    assert bloom.config._attn_implementation != NAME


@pytest.mark.parametrize("masked", [False, True])
def test_grouped_attention_is_that_of_the_library(masked):
    """A query head that is given another group's keys still makes fluent text."""
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    mask = torch.rand(3, 1, 1, 9) > 0.3 if masked else None
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    expected, _ = hf.integrations.sdpa_attention.sdpa_attention_forward(
        module, query, key, value, mask, scaling=0.3
    )
    found, _ = attend(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_padding_behind_a_row_changes_no_bit_of_its_attention(tokens, dtype):
    """In bfloat16 one rounding moves readings by 0.1 of a fitted probe's logit (measured): padding
    on the left, or up to another number of columns than whole vectors, does that."""
    torch.manual_seed(2)
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    for stored in (tokens, 47, 48, 60, 130):
        query = torch.randn(1, 6, tokens, 8, dtype=dtype)
        key, value = (torch.randn(1, 2, 1024, 8, dtype=dtype) for _ in range(2))
        allowed = torch.arange(1024) <= torch.arange(stored - tokens, stored)[:, None]
        mask = torch.zeros(tokens, 1024, dtype=dtype).masked_fill(~allowed, -torch.inf)[None, None]
        key[:, :, stored:] = value[:, :, stored:] = 0
        alone, together, more = (
            attend(module, query, key[:, :, :n], value[:, :, :n], mask[..., :n], scaling=0.3)[0]
            for n in (-(-stored // BLOCK) * BLOCK, -(-stored // BLOCK) * BLOCK + 3 * BLOCK, 1024)
        )
        assert torch.equal(alone, together)
        assert torch.equal(alone, more)


def test_what_is_stored_survives_growing_and_trimming():
    """Every COLUMN_STEP columns the buffers move; an index that is off by one shows then."""
    plain = make_model("llama")
    forward = Forward(plain, None)
    with torch.inference_mode():
        cache = forward.new_cache()
        row = random_tokens(COLUMN_STEP - 3, 1)
        read = forward.new_cache(1)
        forward([row], read, [TAP])
        cache.admit(read, 0)
        for _ in range(5):  # one long row holds the columns of five short ones, and then leaves
            short = forward.new_cache(1)
            forward([[5, 6]], short, [TAP])
            cache.admit(short, 0)
        rows = [row] + [[5, 6] for _ in range(5)]
        for step in range(6):
            for row, token in zip(rows, random_tokens(len(rows), step), strict=True):
                row.append(token)
            logits = forward([row[-1:] for row in rows], cache, [TAP] * len(rows))
        assert_as_alone(logits, plain, rows)
        cache.retire(0)
        rows[0] = rows.pop()
        cache.open(1)
        assert cache.columns == BLOCK


def test_a_poisoned_row_leaves_nothing_to_the_next_in_its_place():
    """Masked columns weigh zero, but zero times a stale NaN is NaN."""
    plain = make_model("llama")
    forward = Forward(plain, None)
    with torch.inference_mode():
        healthy, poisoned = forward.new_cache(1), forward.new_cache(1)
        forward([random_tokens(40, 1)], healthy, [TAP])
        forward([random_tokens(40, 2)], poisoned, [TAP])
        for layer in poisoned._layers:
            layer.keys[:] = torch.nan
            layer.values[:] = torch.nan
        cache = forward.new_cache()
        cache.admit(healthy, 0)
        cache.admit(poisoned, 0)
        row = [*random_tokens(40, 1), 7]
        logits = forward([row[-1:], [7]], cache, [TAP] * 2)
        assert_as_alone(logits[:1], plain, [row])
        cache.retire(1)
        short = forward.new_cache(1)
        forward([[9, 8, 7]], short, [TAP])
        cache.admit(short, 0)
        rows = [[*row, 11], [9, 8, 7, 12]]
        assert_as_alone(forward([[11], [12]], cache, [TAP] * 2), plain, rows)
