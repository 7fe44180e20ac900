"""From a hub id or a folder to a running `TransformersEngine`, or one sentence that says why not.

What is refused: checkpoints that `server.engines.checkpoint` refuses, and models whose cache cannot
hold a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import get_layer_types_and_kwargs

from probes.errors import ModelError
from probes.neurons import find_ffns
from probes.probe import Probe
from probes.tap import Meter
from server.engines.attention import use_batch_attention
from server.engines.base import EngineCard
from server.engines.checkpoint import (
    eos_token_ids,
    identify,
    load_tokenizer,
    load_weights,
    match_all,
    refuse_unreadable,
)
from server.engines.transformers import TransformersEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Prompt and answer together, when the operator does not say: bounds memory, not ability.
DEFAULT_MODEL_LEN = {"cpu": 4096, "cuda": 16_384}
# Prompt tokens that are read in one pass; running streams wait that long for their next token.
PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}


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
    prefix_tokens: int = 0,
) -> TransformersEngine:
    """Load, check, attach the meter and start the engine's thread. Blocks for seconds.

    model_path  a folder, or a hub id (then `revision` is a commit, tag or branch)
    model_id    what the card and the probes' errors call the model
    dtype       "float32", "bfloat16" or "float16"; None: the checkpoint's own
    device      "cpu", "cuda", ...; None: cuda where there is one
    prefix_tokens  of prompts that were read: so many keep their keys and values

    Raises ModelError, or ProbeMismatchError when a probe belongs to another model.
    """
    refuse_unreadable(model_path, revision=revision)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _load_model(model_path, revision, dtype)
    model.to(place)  # type: ignore[arg-type]  # wrapped by a decorator that loses `self`
    tokenizer = load_tokenizer(model_path, revision=revision)
    ffns = find_ffns(model)
    found = identify(model, ffns, tokenizer, model_id=model_id)
    match_all(probes, found)
    make_meter = partial(Meter, ffns, suppression=suppression)
    meter = make_meter(probes) if probes else None
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
            eos_token_ids=eos_token_ids(model, tokenizer),
            dtype=found.dtype,
            identity=found,
        ),
        probes=probes,
        meter=meter,
        make_meter=make_meter,
        max_num_seqs=max_num_seqs,
        max_waiting_requests=max_waiting_requests,
        max_waiting_tokens=max_waiting_tokens,
        prefill_tokens=PREFILL_TOKENS.get(place.type, PREFILL_TOKENS["cpu"]),
        prefix_tokens=prefix_tokens,
    )


def _load_model(model_path: Path | str, revision: str | None, dtype: str | None) -> PreTrainedModel:
    model = load_weights(model_path, revision=revision, dtype=dtype)
    _refuse_other_caches(model, masks_by_row=use_batch_attention(model))
    return model


def _refuse_other_caches(model: PreTrainedModel, *, masks_by_row: bool) -> None:
    """Windows need a mask that knows where each row stands, see server/engines/attention.py."""
    config = model.config.get_text_config(decoder=True)
    batched = {"full_attention", "sliding_attention"} if masks_by_row else {"full_attention"}
    if getattr(config, "num_kv_shared_layers", 0):
        raise ModelError(
            f"{type(model).__name__} shares keys and values between layers; this engine cannot "
            f"batch it: use --engine vllm, or a decoder whose layers keep their own"
        )
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
