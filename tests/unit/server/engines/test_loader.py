"""What is served, and what is refused with one sentence before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from probes.errors import ModelError, ProbeError, ProbeMismatchError
from probes.fingerprint import tokenizer_sha256
from probes.neurons import find_ffns
from server.engines.checkpoint import identify, load_tokenizer, load_weights, refuse_unreadable
from server.engines.loader import load_transformers_engine
from tests.quantised import IMPORTS_OLD_TORCH, quantise


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def load(folder: Path | str, **options: object) -> None:
    load_transformers_engine(folder, model_id="tiny", device="cpu", **options)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


async def test_the_card_says_what_is_served(make_engine):
    """Limits and checks above the seam rest on these."""
    card = make_engine().card
    assert (card.engine, card.model_id, card.dtype) == ("transformers", "tiny", "float32")
    assert card.max_model_len == 512
    assert card.vocab_size == 96
    assert card.eos_token_ids == {2}
    assert (card.identity.num_layers, card.identity.intermediate_size) == (2, 48)
    assert len(card.identity.tokenizer_sha256) == len(card.identity.chat_template_sha256) == 64


async def test_length_and_dtype_are_the_operators(make_engine, request_of, collect):
    """A wish that is silently ignored is a wrong measurement."""
    engine = make_engine(max_model_len=40, dtype="bfloat16", probes=())
    assert (engine.card.max_model_len, engine.card.dtype) == (40, "bfloat16")
    assert len(await collect(engine, request_of([5, 6], 38))) == 38


def test_a_folder_with_code_is_refused(folder):
    """CVE-2026-22807: code of a model repository ran although it was not trusted."""
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    with pytest.raises(ModelError, match=r"modeling_evil\.py"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_that_wants_its_own_code_is_refused(folder, name):
    """`auto_map` may point into another repository."""
    edit(folder / name, auto_map={"AutoModelForCausalLM": "other/repo--evil.Model"})
    with pytest.raises(ModelError, match="auto_map"):
        load(folder)


def test_an_adapter_is_refused(folder):
    """A probe reads one set of weights; peft would merge another in silently."""
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter"):
        load(folder)


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "bitsandbytes"])
def test_a_quantised_checkpoint_is_refused(folder, method):
    """Its columns are not those that the probe was fitted on, to a degree that nobody measured."""
    edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=rf"is quantised \({method}\)"):
        load(folder)


@IMPORTS_OLD_TORCH
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_the_model_that_their_numbers_stand_for(folder, tmp_path, bits):
    """Nothing of the quantisation stays: a scale among the parameters would be another model, and
    a layer that rounds again another reading."""
    quantise(folder, tmp_path / "twin", bits=bits, group=16)
    packed, twin = (
        load_weights(path, revision=None, dtype=None) for path in (folder, tmp_path / "twin")
    )
    refuse_unreadable(folder, revision=None)
    tokenizer = load_tokenizer(folder, revision=None)
    identities = [identify(m, find_ffns(m), tokenizer, model_id="m") for m in (packed, twin)]
    assert identities[0] == identities[1]
    assert [name for name, _ in packed.named_parameters()] == [
        name for name, _ in twin.named_parameters()
    ]
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(packed(input_ids=ids).logits, twin(input_ids=ids).logits)


def test_a_checkpoint_with_missing_weights_is_refused(folder):
    """transformers fills them with random numbers and a warning."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights.*down_proj"):
        load(folder)


def test_pickled_weights_are_refused(folder):
    """Loading a pickle runs what it says."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load(folder)


def test_a_broken_checkpoint_and_a_missing_tokenizer_are_one_sentence(folder):
    """A traceback of the library tells an operator nothing."""
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def test_no_folder_is_no_hub_id(tmp_path):
    """A typing error in a path must not become a question to a hub."""
    with pytest.raises(ModelError, match="not a folder"):
        load(tmp_path / "missing")
    with pytest.raises(ModelError, match="no model at"):
        load("nobody/nothing")


@pytest.mark.parametrize("wish", [1, 513])
def test_a_length_that_the_model_does_not_have_is_refused(tiny_folder, wish):
    """Positions beyond the last one are an index error in the middle of an answer."""
    with pytest.raises(ModelError, match=f"max_model_len {wish}"):
        load(tiny_folder, max_model_len=wish)


def test_an_unknown_dtype_is_refused(tiny_folder):
    """`int8` is not a way to load; the sentence names what is."""
    with pytest.raises(ModelError, match="bfloat16"):
        load(tiny_folder, dtype="int8")


@pytest.mark.parametrize(
    "config",
    [
        lambda: hf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2),
        lambda: hf.Lfm2Config(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
        ),
        lambda: hf.Gemma3nTextConfig(
            vocab_size=96,
            vocab_size_per_layer_input=96,
            hidden_size=32,
            hidden_size_per_layer_input=8,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            layer_types=["full_attention"] * 4,
            num_kv_shared_layers=2,
            laurel_rank=4,
        ),
    ],
)
def test_models_without_plain_keys_and_values_are_refused(
    tiny_folder: Path, tmp_path: Path, config: Callable[[], hf.PretrainedConfig]
):
    """A recurrent state in a padded batch reads the padding: wrong text without an error."""
    hf.AutoModelForCausalLM.from_config(config()).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, tmp_path / name)
    with pytest.raises(ModelError, match="cannot batch it"):
        load(tmp_path)


def test_a_probe_of_another_model_is_refused(folder, tiny_probes):
    """A fine-tune of the same shape: the neurons exist, what they mean has changed."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] *= 1.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProbeMismatchError, match="weights_fingerprint"):
        load(folder, probes=tiny_probes)


def test_two_probes_of_one_name_are_refused(tiny_folder, tiny_probes):
    """A request names its probe: which of the two would read?"""
    with pytest.raises(ProbeError, match="two probes of one name"):
        load(tiny_folder, probes=[tiny_probes[0], tiny_probes[0]])


def test_the_tokenizer_digest_sees_one_changed_word(tiny_folder):
    """Other ids for the same text: every reading would be of another sentence."""
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_folder)
    before = tokenizer_sha256(tokenizer)
    assert before == tokenizer_sha256(hf.AutoTokenizer.from_pretrained(tiny_folder))
    tokenizer.add_tokens(["new"])
    assert tokenizer_sha256(tokenizer) != before
