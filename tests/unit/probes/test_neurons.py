"""Every FFN of the text decoder, exactly once, or a refusal that says what was found."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from probes.errors import ModelError
from probes.neurons import find_ffns

FFN_NAMES = {
    "llama": "model.layers.{}.mlp.down_proj",
    "mistral": "model.layers.{}.mlp.down_proj",
    "qwen2": "model.layers.{}.mlp.down_proj",
    "qwen3": "model.layers.{}.mlp.down_proj",
    "gemma2": "model.layers.{}.mlp.down_proj",
    "gemma3": "model.layers.{}.mlp.down_proj",
    "phi3": "model.layers.{}.mlp.down_proj",
    "olmo2": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "opt": "model.decoder.layers.{}.fc2",
    "falcon": "transformer.h.{}.mlp.dense_4h_to_h",
    "bloom": "transformer.h.{}.mlp.dense_4h_to_h",
    "square": "model.layers.{}.mlp.down_proj",
    "square_gpt2": "transformer.h.{}.mlp.c_proj",
}


@pytest.mark.parametrize("family", FFN_NAMES)
def test_finds_exactly_one_down_projection_per_layer(family, make_model):
    """The reference takes every module with `down_proj` in its name; attention has c_proj too."""
    ffns = find_ffns(make_model(family))
    assert [ffn.layer for ffn in ffns] == [0, 1, 2]
    assert [ffn.name for ffn in ffns] == [FFN_NAMES[family].format(i) for i in range(3)]
    width = {"square": 32, "square_gpt2": 32, "bloom": 128}.get(family, 48)
    for ffn in ffns:
        assert (ffn.intermediate_size, ffn.hidden_size) == (width, 32)
        assert ffn.transposed == ("gpt2" in family)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_column_norms_are_those_of_one_hot_activations(family, make_model):
    """Conv1D stores the weight transposed: norms over the wrong axis would go unnoticed."""
    ffn = find_ffns(make_model(family))[1]
    with torch.no_grad():
        zero = ffn.module(torch.zeros(1, ffn.intermediate_size))
        columns = ffn.module(torch.eye(ffn.intermediate_size)) - zero
    torch.testing.assert_close(ffn.column_norms(), columns.norm(dim=-1))


def test_vision_tower_is_never_taken_for_the_text_decoder(make_gemma3_vision):
    """The tower's fc2 has the same shape and its own layers 0..2."""
    ffns = find_ffns(make_gemma3_vision())
    assert [ffn.name for ffn in ffns] == [
        f"model.language_model.layers.{i}.mlp.down_proj" for i in range(3)
    ]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_mixture_of_experts_is_refused_by_that_name(family, make_model):
    with pytest.raises(ModelError, match="mixture of experts"):
        find_ffns(make_model(family))


def test_mixture_of_experts_as_a_module_list_is_refused():
    """Older or remote code holds one Linear per expert, named down_proj each."""
    block = nn.ModuleDict({"experts": nn.ModuleList(_block()["mlp"] for _ in range(2))})
    with pytest.raises(ModelError, match="mixture of experts"):
        find_ffns(_model(block))


def test_lora_is_refused(llama):
    """A hook on the wrapped base layer would read h without the adapter's part."""
    mlp = llama.model.layers[1].mlp
    wrapper = nn.Module()
    wrapper.base_layer = mlp.down_proj
    wrapper.lora_A = nn.ModuleDict({"default": nn.Linear(48, 2)})
    mlp.down_proj = wrapper
    with pytest.raises(ModelError, match="LoRA"):
        find_ffns(llama)


def test_layer_is_parsed_from_the_name_not_counted(llama):
    """A layer without FFN must not shift the numbers of those behind it."""
    llama.model.layers[1].mlp = nn.Identity()
    with pytest.raises(ModelError, match=r"each of layers 0\.\.2, found model\.layers\.0"):
        find_ffns(llama)


def test_two_down_projections_in_one_layer_are_refused(llama):
    llama.model.layers[2].extra = nn.ModuleDict({"down_proj": nn.Linear(48, 32)})
    with pytest.raises(ModelError, match=r"exactly one .*extra\.down_proj"):
        find_ffns(llama)


def test_two_stacks_are_refused_by_name(llama):
    """A draft model beside the decoder has layers of its own."""
    draft = nn.ModuleDict({"down_proj": nn.Linear(48, 32)})
    llama.draft = nn.ModuleList([nn.ModuleDict({"mlp": draft})])
    with pytest.raises(ModelError, match=r"one stack of 3 .* found draft\.\*, model\.layers\.\*"):
        find_ffns(llama)


def test_a_model_without_any_known_projection_is_refused(llama):
    for layer in llama.model.layers:
        layer.mlp = nn.Identity()
    with pytest.raises(ModelError, match="found none in LlamaForCausalLM"):
        find_ffns(llama)


def test_layers_of_different_width_are_refused(llama):
    llama.model.layers[1].mlp.down_proj = nn.Linear(40, 32)
    with pytest.raises(ModelError, match=r"widths \[40, 48\]"):
        find_ffns(llama)


def test_wrong_output_size_is_refused(llama):
    llama.model.layers[1].mlp.down_proj = nn.Linear(48, 31)
    with pytest.raises(ModelError, match="puts out 31 values, expected the hidden size 32"):
        find_ffns(llama)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype, llama):
    """Column norms of packed weights are meaningless numbers."""
    projection = llama.model.layers[0].mlp.down_proj
    projection.weight = nn.Parameter(torch.zeros(32, 48).to(dtype), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        find_ffns(llama)


def test_a_projection_without_a_weight_is_refused(llama):
    llama.model.layers[0].mlp.down_proj = nn.Identity()
    with pytest.raises(ModelError, match="found none"):
        find_ffns(llama)


def test_offloaded_weights_are_refused(llama):
    llama.model.layers[0].mlp.down_proj.to("meta")
    with pytest.raises(ModelError, match="offloaded"):
        find_ffns(llama)


def test_a_model_without_config_is_refused():
    with pytest.raises(ModelError, match="no configuration with an integer num_hidden_layers"):
        find_ffns(nn.Linear(2, 2))


def test_encoder_decoder_is_refused():
    model = _model(_block())
    model.config.is_encoder_decoder = True
    with pytest.raises(ModelError, match="encoder-decoder"):
        find_ffns(model)


def test_a_root_stack_is_found():
    """A bare ModuleList as model: names begin with the number."""
    model = nn.ModuleList([_block()])
    model.config = SimpleNamespace(num_hidden_layers=1, hidden_size=4, vocab_size=9)
    assert [ffn.name for ffn in find_ffns(model)] == ["0.mlp.down_proj"]


def _block() -> nn.ModuleDict:
    return nn.ModuleDict({"mlp": nn.ModuleDict({"down_proj": nn.Linear(8, 4)})})


def _model(block: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    model.config = SimpleNamespace(num_hidden_layers=1, hidden_size=4, vocab_size=9)
    return model


def test_norms_live_where_their_layer_lives(make_model):
    """Trap 13: the reference moves all norms to the model's first device, and a model that is
    spread over several breaks. The meta device stands for a second one."""
    ffns = find_ffns(make_model("llama"))
    ffns[1].module.to("meta")
    assert [ffn.column_norms().device.type for ffn in ffns] == ["cpu", "meta", "cpu"]
