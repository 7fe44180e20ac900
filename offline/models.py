"""The model that a probe is fitted on: loaded and identified as when it is served."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from huggingface_hub import try_to_load_from_cache

from offline.records import FILES, Header, RecordError
from probes.card import ModelIdentity
from probes.errors import ModelError
from probes.fingerprint import chat_template_sha256, identity, tokenizer_sha256
from probes.neurons import find_ffns
from probes.quantised import ask_for_plain, make_plain, quantisation, refuse_unproven

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BLOCK = 2**16  # bytes, of which a file shows BLOCKS to its digest
BLOCKS = 256


class LoadedTokenizer(NamedTuple):
    """A tokenizer with the digests that bind answers to it."""

    tokenizer: PreTrainedTokenizerBase
    tokenizer_sha256: str
    chat_template_sha256: str
    revision: str = ""  # commit of a hub id, or FILES and a digest of a folder's weights

    def check(self, header: Header, path: Path) -> None:
        """RecordError when `path`, which opens with `header`, was made with another tokenizer,
        commit or weights."""
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
        _revision(model, revision),
    )


def _revision(model: str, revision: str | None) -> str:
    """The commit that a hub id has just been read from; of a folder what its weights are."""
    if Path(model).is_dir():
        return digest_of_files(Path(model))
    cached = try_to_load_from_cache(model, "tokenizer_config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else ""


def digest_of_files(folder: Path) -> str:
    """FILES and a sha256 over configuration and weights: of each file its size and, since a fine-
    tune changes all of it, evenly spaced blocks. "" where there are no weights."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        return ""
    digest = hashlib.sha256()
    for path in (folder / "config.json", *weights):
        size = path.stat().st_size
        blocks = {size * i // BLOCKS // BLOCK for i in range(BLOCKS)}
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            for block in sorted(blocks):
                file.seek(block * BLOCK)
                digest.update(file.read(BLOCK))
    return FILES + digest.hexdigest()


def load_model(
    model: str,
    *,
    revision: str | None,
    tokenizer: LoadedTokenizer,
    dtype: str = "auto",
    device_map: str | None = None,
) -> LoadedModel:
    """ModelError when the model cannot be read, or is quantised in a way that is not proven.

    dtype       of the weights, as the server's: auto is the checkpoint's own
    device_map  transformers' word for how a model that no GPU holds alone is spread: auto, ...
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

    try:
        config = AutoConfig.from_pretrained(model, revision=revision or "main")
        if quantised := quantisation(config.to_dict()):
            refuse_unproven(short_name(model), quantised)
        ask_for_plain(config)
        # transformers' sdpa leaves the cap of Gemma 2's scores out; engines that serve do not.
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            config=config,
            attn_implementation="eager" if capped else None,
            revision=revision or "main",
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError) as exc:
        raise ModelError(f"cannot load {model!r}: {exc}") from exc
    if not isinstance(loaded, PreTrainedModel):
        raise ModelError(f"{model} loads as {type(loaded).__name__}, not as a language model")
    make_plain(loaded)
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
