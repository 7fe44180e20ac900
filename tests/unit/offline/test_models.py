"""Loading: dtype and device map are the caller's, names carry no path."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from offline.models import load_model, load_tokenizer, short_name
from offline.records import FILES
from probes.errors import ModelError
from probes.neurons import find_ffns
from tests.quantised import IMPORTS_OLD_TORCH, quantise


@pytest.fixture
def folder(
    tmp_path: Path, tiny_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Path:
    tiny_model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize(("dtype", "found"), [("auto", "bfloat16"), ("float32", "float32")])
def test_a_probe_is_bound_to_the_dtype_that_was_asked_for(
    folder: Path, dtype: str, found: str
) -> None:
    """A server with --dtype float32 reads other logits: it needs a probe that was fitted so."""
    loaded = load_model(
        str(folder),
        revision=None,
        tokenizer=load_tokenizer(str(folder), revision=None),
        dtype=dtype,
    )
    assert loaded.identity.dtype == found
    assert loaded.model.dtype == getattr(torch, found)


def test_a_model_that_is_spread_is_the_same_model(folder: Path) -> None:
    """The library places the layers (here: all on the CPU) and wraps them; they are still found."""
    tokenizer = load_tokenizer(str(folder), revision=None)
    plain, spread = (
        load_model(str(folder), revision=None, tokenizer=tokenizer, device_map=device_map)
        for device_map in (None, "auto")
    )
    assert spread.identity == plain.identity
    assert len(find_ffns(spread.model)) == 3


@IMPORTS_OLD_TORCH
def test_packed_weights_are_read_as_the_server_reads_them(folder: Path, tmp_path: Path) -> None:
    """A probe is fitted on the de-quantised model, and served on it: the same identity."""
    quantise(folder, tmp_path / "twin", group=8)
    tokenizer = load_tokenizer(str(folder), revision=None)
    packed, twin = (
        load_model(str(path), revision=None, tokenizer=tokenizer).identity
        for path in (folder, tmp_path / "twin")
    )
    assert packed.weights_fingerprint == twin.weights_fingerprint
    assert packed.config_digest == twin.config_digest


def test_a_folder_without_weights_is_one_sentence(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tokenizer = load_tokenizer(str(folder), revision=None)
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(folder), revision=None, tokenizer=tokenizer)


def test_a_hub_id_keeps_its_owner_and_a_folder_loses_its_path(folder: Path) -> None:
    """The hub files a probe under its model by this name; a path tells where somebody works."""
    assert short_name("org/name") == "org/name"
    assert short_name(str(folder)) == "tiny"


def test_a_hub_id_has_a_commit_and_a_folder_a_digest_of_its_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from where the library keeps what it downloaded; `main` moves, a commit does not."""
    commit = "c0ffee" * 6 + "cafe"
    kept = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(folder, kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit):
        assert load_tokenizer("org/tiny", revision=revision).revision == commit
    digest = load_tokenizer(str(folder), revision=None).revision
    assert digest.startswith(FILES)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")  # a fine-tune: the same sizes, tokenizer and template
    assert load_tokenizer(str(folder), revision=None).revision not in ("", digest)
    (folder / "model.safetensors").unlink()
    assert load_tokenizer(str(folder), revision=None).revision == ""


def test_scores_that_a_model_caps_are_capped_when_it_is_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Gemma 2's. The library's default attention leaves the cap out, and other neurons fire."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        attn_logit_softcapping=1.0,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(
        str(tmp_path), revision=None, tokenizer=load_tokenizer(str(tmp_path), revision=None)
    ).model
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        found, default = loaded(ids).logits, model(ids).logits
        model.set_attn_implementation("eager")
        capped = model(ids).logits
    torch.testing.assert_close(found, capped)
    assert (found - default).abs().max() > 0.01
