"""From a hub id or a folder to a running `TransformersEngine`, or one sentence that says why not.

Nothing from a model repository is executed: folders with code are refused, weights are safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from probes.errors import ModelError, ProbeError
from probes.fingerprint import chat_template_sha256, identity, match, tokenizer_sha256
from probes.neurons import find_ffns
from probes.probe import Probe
from probes.tap import Meter
from server.engines.attention import use_batch_attention
from server.engines.base import EngineCard
from server.engines.transformers import TransformersEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Prompt and answer together, when the operator does not say: bounds memory, not ability.
DEFAULT_MODEL_LEN = {"cpu": 4096, "cuda": 16_384}
# Prompt tokens that are read in one pass; running streams wait that long for their next token.
PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}
# Caches that a batch of rows can live in. Others (recurrent states, chunks) need their own engine.


def load_transformers_engine(
    model_path: Path | str,
    *,
    model_id: str,
    revision: str | None = None,
    probes: Sequence[Probe] = (),
    dtype: str | None = None,
    device: str | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = 16,
    max_waiting_requests: int = 64,
    max_waiting_tokens: int = 65_536,
    suppression: bool = True,
) -> TransformersEngine:
    """Load, check, attach the meter and start the engine's thread. Blocks for seconds.

    model_path  a folder, or a hub id (then `revision` is a commit, tag or branch)
    model_id    what the card and the probes' errors call the model
    dtype       "float32", "bfloat16" or "float16"; None: the checkpoint's own
    device      "cpu", "cuda", ...; None: cuda where there is one

    Raises ModelError, or ProbeMismatchError when a probe belongs to another model.
    """
    _refuse_code(model_path, revision)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _load_model(model_path, revision, dtype)
    model.to(place)  # type: ignore[arg-type]  # wrapped by a decorator that loses `self`
    tokenizer = _load_tokenizer(model_path, revision)
    ffns = find_ffns(model)
    commit = getattr(model.config, "_commit_hash", None) or ""
    found = identity(
        model,
        ffns,
        model_id=model_id,
        revision=commit,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        chat_template_sha256=chat_template_sha256(tokenizer),
    )
    names = [probe.card.name for probe in probes]
    if len(set(names)) != len(names):
        raise ProbeError(f"two probes of one name: {names}; each needs its own")
    for probe in probes:
        match(probe, found)
    meter = Meter(ffns, probes, suppression=suppression) if probes else None
    if meter is not None:
        meter.attach()
    return TransformersEngine(
        model,
        tokenizer,
        EngineCard(
            engine="transformers",
            model_id=model_id,
            max_model_len=_model_len(model, place, max_model_len),
            vocab_size=min(len(tokenizer), found.vocab_size),
            eos_token_ids=_eos_token_ids(model, tokenizer),
            dtype=found.dtype,
            identity=found,
        ),
        probes=probes,
        meter=meter,
        max_num_seqs=max_num_seqs,
        max_waiting_requests=max_waiting_requests,
        max_waiting_tokens=max_waiting_tokens,
        prefill_tokens=PREFILL_TOKENS.get(place.type, PREFILL_TOKENS["cpu"]),
    )


def _load_model(model_path: Path | str, revision: str | None, dtype: str | None) -> PreTrainedModel:
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_path,
            revision=revision or "main",
            dtype=DTYPES[dtype] if dtype else "auto",
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{model_path} cannot be loaded: {str(error).splitlines()[0]}") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    absent = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if absent:
        raise ModelError(
            f"{model_path} lacks weights of {type(model).__name__} ({len(absent)}, first "
            f"{absent[0]}); they would be random: get the whole checkpoint"
        )
    model.requires_grad_(False)
    _refuse_other_caches(model, masks_by_row=use_batch_attention(model))
    model.train(False)
    return model


def _load_tokenizer(model_path: Path | str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model_path, revision=revision or "main"
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{model_path} has no usable tokenizer: {error}") from error
    return tokenizer


def _refuse_code(model_path: Path | str, revision: str | None) -> None:
    """A model repository holds weights; one that wants to run code, or to be merged, is refused."""
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
        raise ModelError(f"no model at {model_path}: {str(error).splitlines()[0]}") from error
    if "auto_map" in config or "auto_map" in get_tokenizer_config(model_path, revision=revision):
        raise ModelError(
            f"{model_path} wants its own code to be run (auto_map), which is never done: use a "
            f"model that transformers knows by itself"
        )


def _refuse_other_caches(model: PreTrainedModel, *, masks_by_row: bool) -> None:
    """Windows need a mask that knows where each row stands, see server/engines/attention.py."""
    config = model.config.get_text_config(decoder=True)
    batched = {"full_attention", "sliding_attention"} if masks_by_row else {"full_attention"}
    kinds = set(get_layer_types_and_kwargs(config)[0]) - batched
    if kinds or model._is_stateful or config.is_encoder_decoder:
        kind = ", ".join(sorted(kinds)) or "a recurrent state"
        raise ModelError(
            f"{type(model).__name__} keeps {kind} instead of plain attention keys and values; "
            f"this engine cannot batch it: use a decoder with full or sliding-window attention"
        )


def _model_len(model: PreTrainedModel, device: torch.device, wanted: int | None) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if wanted is None:
        default = DEFAULT_MODEL_LEN.get(device.type, DEFAULT_MODEL_LEN["cpu"])
        return min(limit or default, default)
    if wanted < 2 or (limit is not None and wanted > limit):
        raise ModelError(f"max_model_len {wanted} is outside 2..{limit or 'any'} of this model")
    return wanted


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    said = model.generation_config.eos_token_id if model.generation_config else None
    ids = said if isinstance(said, list) else [said]
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)
