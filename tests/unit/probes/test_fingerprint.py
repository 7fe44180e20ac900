"""A probe reads the model that it was fitted on, and no other."""

from __future__ import annotations

import copy

import msgspec
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import BPE

from probes import fingerprint
from probes.errors import ModelError, ProbeMismatchError
from probes.fingerprint import (
    chat_template_sha256,
    config_digest,
    identity,
    match,
    tokenizer_sha256,
    weights_fingerprint,
)
from probes.neurons import find_ffns
from probes.probe import Probe


def _identity(model, **changes):
    names = {
        "model_id": "tiny",
        "revision": "",
        "tokenizer_sha256": "a" * 64,
        "chat_template_sha256": "b" * 64,
    }
    return identity(model, find_ffns(model), **{**names, **changes})


@pytest.fixture
def bound_probe(llama, make_card):
    return Probe.make(
        make_card(model=_identity(llama)),
        layer=[0],
        neuron=[0],
        weight=[[1.0, 1.0]],
        column_norm=[1.0],
        bias=[0.0, 0.0],
    )


def test_the_same_model_matches_under_any_name(llama, make_model, bound_probe):
    """A folder and a hub id may hold the same model."""
    match(bound_probe, _identity(llama))
    match(bound_probe, _identity(make_model("llama"), model_id="other", revision="f" * 40))


def _scaled(model):
    model.model.layers[1].mlp.down_proj.weight.data *= 1.001


def _one_weight(model):
    model.model.norm.weight.data[0] += 1e-3


def _merged_lora(model):
    """The usual adapter: attention only; every down projection stays as it was."""
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data += 1e-3 * torch.randn(32, 2) @ torch.randn(2, 32)


def _other_head(model):
    model.lm_head.weight.data[5] += 0.01


@pytest.mark.parametrize("change", [_scaled, _one_weight, _merged_lora, _other_head])
def test_changed_weights_are_refused_by_fingerprint(change, llama, bound_probe):
    """R14: a fine-tune moves the neurons without changing a shape."""
    change(llama)
    with pytest.raises(ProbeMismatchError, match="weights_fingerprint") as caught:
        match(bound_probe, _identity(llama))
    assert caught.value.field == "weights_fingerprint"
    assert bound_probe.id in str(caught.value)


def test_other_dtype_is_refused_by_name(llama, bound_probe):
    with pytest.raises(ProbeMismatchError, match=r"dtype is 'bfloat16', .* 'float32'"):
        match(bound_probe, _identity(llama.bfloat16()))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 4),
        ("hidden_size", 64),
        ("intermediate_size", 99),
        ("vocab_size", 100),
        ("dtype", "float16"),
        ("config_digest", "0" * 64),
        ("weights_fingerprint", "0" * 64),
        ("tokenizer_sha256", "0" * 64),
        ("chat_template_sha256", ""),
    ],
)
def test_every_field_is_compared_and_named(field, value, llama, bound_probe):
    found = msgspec.structs.replace(_identity(llama), **{field: value})
    with pytest.raises(ProbeMismatchError) as caught:
        match(bound_probe, found)
    assert caught.value.field == field
    assert repr(value) in str(caught.value)


def test_no_field_of_the_identity_is_forgotten(bound_probe):
    """A field that is added later must be compared, or be named here."""
    for_people = {"model_id", "revision"}
    assert set(bound_probe.card.model.__struct_fields__) - for_people == set(fingerprint.COMPARED)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "rms_norm_eps", 1e-3),
        ("llama", "hidden_act", "gelu"),
        ("llama", "num_key_value_heads", 4),
        ("llama", "rope_parameters", {"rope_theta": 5.0, "rope_type": "default"}),
        ("gemma2", "sliding_window", 7),
        ("gemma2", "attn_logit_softcapping", 3.0),
        ("gpt2", "activation_function", "relu"),
        ("gpt_neox", "use_parallel_residual", False),
    ],
)
def test_configuration_that_changes_numbers_changes_the_digest(family, key, value, make_model):
    config = make_model(family).config
    changed = copy.deepcopy(config)
    setattr(changed, key, value)
    assert getattr(config, key) != value
    assert config_digest(changed) != config_digest(config)


def test_names_paths_versions_and_dtype_do_not_change_the_digest(llama, tmp_path):
    """A probe must survive saving the model elsewhere with another library version."""
    before = config_digest(llama.config)
    llama.save_pretrained(tmp_path)
    config = hf.AutoConfig.from_pretrained(tmp_path)
    config.transformers_version = "9.9"
    config.dtype = torch.float16
    config.use_cache = False
    assert config_digest(config) == before


def test_saving_and_loading_keeps_the_identity(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert _identity(again) == _identity(llama)


def test_text_decoder_of_a_multimodal_model_has_an_identity(make_gemma3_vision):
    found = _identity(make_gemma3_vision())
    assert (found.num_layers, found.intermediate_size, found.hidden_size) == (3, 48, 32)


def test_mixed_dtypes_are_refused(llama):
    llama.model.layers[1].mlp.down_proj.bfloat16()
    with pytest.raises(ModelError, match=r"\['bfloat16', 'float32'\]"):
        _identity(llama)


def test_large_parameters_are_sampled_from_end_to_end():
    """One rule for all sizes; the first and the last element always count."""
    large = torch.zeros(fingerprint.WHOLE + 5)
    before = weights_fingerprint([large])
    for at in (0, fingerprint.WHOLE + 4, fingerprint.BLOCK - 1):
        changed = large.clone()
        changed[at] = 1
        assert weights_fingerprint([changed]) != before
    assert weights_fingerprint([large[:-1]]) != before
    whole = torch.zeros(fingerprint.WHOLE)
    changed = whole.clone()
    changed[777_777] = 1
    assert weights_fingerprint([changed]) != weights_fingerprint([whole])


def test_fingerprint_does_not_depend_on_order_or_layout():
    """Sharding and file layout change both."""
    a, b = torch.randn(4, 6), torch.randn(3)
    strided = a.T.contiguous().T
    assert not strided.is_contiguous()
    assert weights_fingerprint([b, strided]) == weights_fingerprint([a, b])
    assert weights_fingerprint([a.reshape(6, 4), b]) != weights_fingerprint([a, b])


def _tokenizer(*, merges=(), template=None):
    vocab = {"a": 0, "b": 1, "ab": 2}
    backend = Tokenizer(BPE(vocab, list(merges)))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = template
    return tokenizer


def test_tokenizer_digest_sees_merges_but_not_padding():
    """Other merges give other ids for the same text; padding is set by whoever used it last."""
    plain = tokenizer_sha256(_tokenizer())
    assert tokenizer_sha256(_tokenizer(merges=[("a", "b")])) != plain
    padded = _tokenizer()
    padded.backend_tokenizer.enable_padding(length=8)
    padded.backend_tokenizer.enable_truncation(4)
    assert tokenizer_sha256(padded) == plain


def test_chat_template_digest_sees_every_character():
    digests = {
        chat_template_sha256(_tokenizer(template=template))
        for template in (None, "{{ messages }}", "{{ messages }} ", {"default": "x"})
    }
    assert len(digests) == 4


def test_slow_tokenizers_are_refused():
    with pytest.raises(ModelError, match="not a fast tokenizer"):
        tokenizer_sha256(object())
