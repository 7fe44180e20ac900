"""A model as it lies on disk: its weights, its tokenizer, its identity, or one sentence why not.

What every engine that serves a checkpoint needs. Nothing from a model repository is executed:
folders with code are refused, weights are safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from probes.card import ModelIdentity
from probes.errors import ModelError, ProbeError
from probes.fingerprint import chat_template_sha256, identity, match, tokenizer_sha256
from probes.neurons import FFN
from probes.probe import Probe
from probes.quantised import ask_for_plain, make_plain, quantisation, refuse_unproven

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_weights(
    model_path: Path | str, *, revision: str | None, dtype: str | None
) -> PreTrainedModel:
    """The transformers model on the CPU, frozen and de-quantised; ModelError when a weight is
    missing.

    `model_path` is a folder or a hub id; `dtype` None is the checkpoint's own.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        config = AutoConfig.from_pretrained(model_path, revision=revision or "main")
        ask_for_plain(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_path,
            config=config,
            revision=revision or "main",
            dtype=DTYPES[dtype] if dtype else "auto",
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"{model_path} cannot be loaded: {_first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    absent = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if absent:
        raise ModelError(
            f"{model_path} lacks weights of {type(model).__name__} ({len(absent)}, first "
            f"{absent[0]}); they would be random: get the whole checkpoint"
        )
    make_plain(model)
    model.requires_grad_(False)
    model.train(False)
    return model


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def load_tokenizer(model_path: Path | str, *, revision: str | None) -> PreTrainedTokenizerBase:
    """ModelError when there is none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model_path, revision=revision or "main"
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{model_path} has no usable tokenizer: {error}") from error
    return tokenizer


def refuse_unreadable(model_path: Path | str, *, revision: str | None) -> None:
    """ModelError unless the repository holds weights and nothing else: no code, no adapter, nothing
    quantised in a way that changes what neurons are."""
    folder = Path(model_path)
    if folder.is_dir():
        scripts = sorted(path.name for path in folder.glob("*.py"))
        if scripts:
            raise ModelError(f"{folder} holds code ({scripts[0]}), which is never run: remove it")
        if (folder / "adapter_config.json").exists():
            raise ModelError(f"{folder} is an adapter: merge it into its base model and save that")
    elif folder.is_absolute() or str(model_path).startswith("."):
        raise ModelError(f"{folder} is not a folder: name a model folder or a hub id")
    try:
        config, _ = PreTrainedConfig.get_config_dict(model_path, revision=revision or "main")
    except OSError as error:
        raise ModelError(f"no model at {model_path}: {_first_line(error)}") from error
    if "auto_map" in config or "auto_map" in get_tokenizer_config(model_path, revision=revision):
        raise ModelError(
            f"{model_path} wants its own code to be run (auto_map), which is never done: use a "
            f"model that transformers knows by itself"
        )
    if quantised := quantisation(config):
        refuse_unproven(str(model_path), quantised)


def identify(
    model: PreTrainedModel,
    ffns: Sequence[FFN],
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_id: str,
) -> ModelIdentity:
    """What a probe is matched against."""
    return identity(
        model,
        ffns,
        model_id=model_id,
        revision=getattr(model.config, "_commit_hash", None) or "",
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        chat_template_sha256=chat_template_sha256(tokenizer),
    )


def match_all(probes: Sequence[Probe], found: ModelIdentity) -> None:
    """ProbeError when two probes share a name, ProbeMismatchError when one is of another model."""
    names = [probe.card.name for probe in probes]
    if len(set(names)) != len(names):
        raise ProbeError(f"two probes of one name: {names}; each needs its own")
    for probe in probes:
        match(probe, found)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: those of the generation config and the tokenizer's own."""
    said = model.generation_config.eos_token_id if model.generation_config else None
    ids = said if isinstance(said, list) else [said]
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)
