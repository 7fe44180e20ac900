"""Which model is this: a digest of its configuration and one of its weights.

Both are independent of device, sharding, parameter names, file layout and library version. The
weights' digest covers every parameter, not only the down projections: an adapter merged into the
attention alone changes what the neurons see without changing them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import msgspec
import torch
from torch import Tensor, nn

from probes.card import ModelIdentity
from probes.errors import ModelError, ProbeMismatchError
from probes.neurons import FFN, TextConfig, text_config
from probes.probe import Probe

# One rule for all sizes: a parameter of up to 2**20 elements counts whole, of a larger one 64
# evenly spaced blocks of 2**14 elements do. Models of up to ~500M parameters are covered nearly
# completely, an 8B model by 600 MB (a second).
WHOLE = 2**20
BLOCKS = 64
BLOCK = WHOLE // BLOCKS

# Shapes and dtype come first: they explain a difference, a digest only states it.
COMPARED = (
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "dtype",
    "config_digest",
    "weights_fingerprint",
    "tokenizer_sha256",
    "chat_template_sha256",
)

# What changes a model's numbers without changing the shape of a weight, and the main sizes.
# Named one by one: a library that adds a setting must not change the digest of an old model.
_CONFIG_KEYS = (
    "activation",
    "activation_function",
    "alibi",
    "apply_residual_connection_post_layernorm",
    "attention_bias",
    "attention_multiplier",
    "attn_logit_softcapping",
    "bias",
    "do_layer_norm_before",
    "embedding_multiplier",
    "ffn_dim",
    "ffn_hidden_size",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layer_types",
    "logits_scaling",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "model_type",
    "multi_query",
    "n_embd",
    "n_head",
    "n_inner",
    "n_layer",
    "n_positions",
    "new_decoder_architecture",
    "norm_epsilon",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_kv_heads",
    "parallel_attn",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rms_norm_eps",
    "rope_parameters",
    "rotary_pct",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
    "sliding_window",
    "tie_word_embeddings",
    "use_bidirectional_attention",
    "use_parallel_residual",
    "use_sliding_window",
    "vocab_size",
    "word_embed_proj_dim",
)


def identity(
    model: nn.Module,
    ffns: Sequence[FFN],
    *,
    model_id: str,
    revision: str,
    tokenizer_sha256: str,
    chat_template_sha256: str,
) -> ModelIdentity:
    """The identity of a loaded model; ModelError when its FFNs differ in dtype."""
    dtypes = {str(ffn.weight.dtype).removeprefix("torch.") for ffn in ffns}
    if len(dtypes) != 1:
        raise ModelError(f"expected FFN weights of one dtype, found {sorted(dtypes)}")
    config = text_config(model)
    return ModelIdentity(
        model_id=model_id,
        revision=revision,
        config_digest=config_digest(config),
        weights_fingerprint=weights_fingerprint(model.parameters()),
        tokenizer_sha256=tokenizer_sha256,
        chat_template_sha256=chat_template_sha256,
        dtype=dtypes.pop(),
        num_layers=len(ffns),
        intermediate_size=ffns[0].intermediate_size,
        hidden_size=ffns[0].hidden_size,
        vocab_size=config.vocab_size,
    )


def config_digest(config: TextConfig) -> str:
    """sha256 of the canonical JSON of what the configuration says about the arithmetic."""
    values = config.to_dict()
    known = {key: values[key] for key in _CONFIG_KEYS if values.get(key) is not None}
    return hashlib.sha256(msgspec.json.encode(known, order="deterministic")).hexdigest()


def weights_fingerprint(parameters: Iterable[Tensor]) -> str:
    """sha256 over the sorted sha256 of every parameter: dtype, shape and bytes (see WHOLE)."""
    digests = sorted(_parameter_digest(parameter.detach()) for parameter in parameters)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def tokenizer_sha256(tokenizer: object) -> str:
    """Digest of what turns text into ids: vocabulary, merges, added tokens, pre- and post-steps.

    `tokenizer` is a fast tokenizer of transformers; duck-typed. ModelError for a slow one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; the model needs a tokenizer.json"
        )
    content = json.loads(backend.to_str())
    for setting in ("version", "truncation", "padding"):
        content.pop(setting, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def chat_template_sha256(tokenizer: object) -> str:
    """Digest of what turns messages into a prompt; of the empty text where there is none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def match(probe: Probe, found: ModelIdentity) -> None:
    """ProbeMismatchError naming the first field in which `found` differs from the probe's model.

    `model_id` and `revision` are for people and are not compared.
    """
    expected = probe.card.model
    for field in COMPARED:
        wanted, here = getattr(expected, field), getattr(found, field)
        if wanted != here:
            raise ProbeMismatchError(probe.id, field, expected=wanted, found=here)


def _parameter_digest(parameter: Tensor) -> bytes:
    digest = hashlib.sha256(f"{parameter.dtype} {tuple(parameter.shape)} ".encode())
    flat = parameter.reshape(-1)
    last = flat.numel() - BLOCK
    blocks = (
        [flat]
        if flat.numel() <= WHOLE
        else [
            flat[start : start + BLOCK]
            for start in (last * i // (BLOCKS - 1) for i in range(BLOCKS))
        ]
    )
    for block in blocks:
        digest.update(block.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.digest()
