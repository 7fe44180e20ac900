"""The model that a probe is fitted on: loaded and identified as when it is served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from huggingface_hub import try_to_load_from_cache

from offline.records import Header, RecordError
from probes.card import ModelIdentity
from probes.errors import ModelError
from probes.fingerprint import chat_template_sha256, identity, tokenizer_sha256
from probes.neurons import find_ffns

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LoadedTokenizer(NamedTuple):
    """A tokenizer with the digests that bind answers to it."""

    tokenizer: PreTrainedTokenizerBase
    tokenizer_sha256: str
    chat_template_sha256: str
    revision: str = ""  # commit of a hub id; "" for a folder, which fits any

    def check(self, header: Header, path: Path) -> None:
        """RecordError when `path`, which opens with `header`, was made with another tokenizer or
        commit."""
        header.check_revision(self.revision, path)
        for field in ("tokenizer_sha256", "chat_template_sha256"):
            mine, theirs = getattr(self, field), getattr(header, field)
            if mine != theirs:
                raise RecordError(
                    f"{path} was made with another model: {field} is {theirs}, here {mine}; "
                    f"give the model that answered"
                )


class LoadedModel(NamedTuple):
    """A model on the CPU, the first GPU, or spread over devices."""

    model: PreTrainedModel
    identity: ModelIdentity
    end_tokens: frozenset[int]


def short_name(model: str) -> str:
    """A hub id as it is, of a folder its name: what people call the model; no path of a machine."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def load_tokenizer(model: str, *, revision: str | None) -> LoadedTokenizer:
    """`model` is a folder or a hub id; no code of a repository is executed. ModelError if none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision or "main")
    except (OSError, ValueError) as exc:
        raise ModelError(f"no tokenizer in {model!r}: {exc}") from exc
    return LoadedTokenizer(
        tokenizer,
        tokenizer_sha256(tokenizer),
        chat_template_sha256(tokenizer),
        _commit(model, revision),
    )


def _commit(model: str, revision: str | None) -> str:
    """The commit that a hub id has just been read from; "" for a folder."""
    if Path(model).is_dir():
        return ""
    cached = try_to_load_from_cache(model, "tokenizer_config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else ""


def load_model(
    model: str,
    *,
    revision: str | None,
    tokenizer: LoadedTokenizer,
    dtype: str = "auto",
    device_map: str | None = None,
) -> LoadedModel:
    """ModelError when the model cannot be read.

    dtype       of the weights, as the server's: auto is the checkpoint's own
    device_map  transformers' word for how a model that no GPU holds alone is spread: auto, ...
    """
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedModel

    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            revision=revision or "main",
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
        )
    except (OSError, ValueError) as exc:
        raise ModelError(f"cannot load {model!r}: {exc}") from exc
    if not isinstance(loaded, PreTrainedModel):
        raise ModelError(f"{model} loads as {type(loaded).__name__}, not as a language model")
    if device_map is None and torch.cuda.is_available():
        loaded.to("cuda")  # type: ignore[arg-type]  # wrapped by a decorator that loses `self`
    ends: set[object] = {tokenizer.tokenizer.eos_token_id}
    for config in (loaded.generation_config, loaded.config):
        named = getattr(config, "eos_token_id", None)
        ends |= set(named) if isinstance(named, list) else {named}
    found = identity(
        loaded,
        find_ffns(loaded),
        model_id=short_name(model),
        revision=getattr(loaded.config, "_commit_hash", None) or "",
        tokenizer_sha256=tokenizer.tokenizer_sha256,
        chat_template_sha256=tokenizer.chat_template_sha256,
    )
    return LoadedModel(loaded, found, frozenset(end for end in ends if isinstance(end, int)))
