"""Tiny random models of every supported family, and probes for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from probes.calibration import OperatingPoint, Platt
from probes.card import (
    SCHEMA_VERSION,
    ModelIdentity,
    ProbeCard,
    ReferenceRisks,
    ResponseRule,
    SpanRule,
    TokenRule,
)
from probes.cett import FORMULA_VERSION
from probes.known_answer import build
from probes.neurons import FFN, find_ffns
from probes.probe import Probe
from probes.spans import Pooling

VOCAB = 97
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCAB}
_ATTENTION = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}

FAMILIES: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**_GROUPED),
    "mistral": lambda: hf.MistralConfig(**_GROUPED),
    "qwen2": lambda: hf.Qwen2Config(**_GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**_GROUPED, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**_GROUPED, head_dim=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**_GROUPED, head_dim=8),
    "phi3": lambda: hf.Phi3Config(**_GROUPED),
    "olmo2": lambda: hf.Olmo2Config(**_GROUPED),
    "gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_inner=48, **_IDS),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SIZES),
    "opt": lambda: hf.OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **_ATTENTION, **_IDS),
    "falcon": lambda: hf.FalconConfig(ffn_hidden_size=48, **_ATTENTION, **_IDS),
    "bloom": lambda: hf.BloomConfig(hidden_size=32, n_layer=3, n_head=4, **_IDS),
    "square": lambda: hf.LlamaConfig(**{**_GROUPED, "intermediate_size": 32}),
    "square_gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_inner=32, **_IDS),
}
EXPERTS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "mixtral": lambda: hf.MixtralConfig(**_GROUPED, num_local_experts=4),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **_GROUPED, num_experts=4, moe_intermediate_size=16, head_dim=8
    ),
    "olmoe": lambda: hf.OlmoeConfig(**_GROUPED, num_experts=4),
}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[[str], nn.Module]:
    """Name of a family -> a fresh random model, the same every time."""

    def make(family: str) -> nn.Module:
        config = {**FAMILIES, **EXPERTS}[family]()
        return _seeded(lambda: hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32))

    return make


@pytest.fixture(scope="session")
def make_gemma3_vision() -> Callable[[], nn.Module]:
    """A multimodal Gemma 3 whose vision tower has the very shape of its text decoder."""

    def make() -> nn.Module:
        vision = {**_ATTENTION, "intermediate_size": 48, "image_size": 28, "patch_size": 14}
        config = hf.Gemma3Config(
            text_config={**_GROUPED, "head_dim": 8},
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=90,
            boi_token_index=91,
            eoi_token_index=92,
        )
        return _seeded(lambda: hf.Gemma3ForConditionalGeneration(config))

    return make


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """[3, 7] token ids without padding."""
    return torch.randint(3, 80, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def make_card() -> Callable[..., ProbeCard]:
    """A sound card; keyword arguments replace fields."""

    def make(**changes: object) -> ProbeCard:
        points = (
            OperatingPoint(name="fpr_1", threshold=0.8, false_positive_rate=0.01, recall=0.3),
            OperatingPoint(name="fpr_5", threshold=0.6, false_positive_rate=0.05, recall=0.5),
        )
        fields: dict[str, object] = {
            "schema_version": SCHEMA_VERSION,
            "formula_version": FORMULA_VERSION,
            "name": "tiny",
            "position": "read",
            "heads": ("token", "answer"),
            "token": TokenRule(
                head="token",
                calibration=Platt(slope=1.5, intercept=-0.5),
                span=SpanRule(
                    pooling=Pooling("mean"), calibration=Platt(slope=1.2, intercept=-0.7)
                ),
                operating_points=points,
                default="fpr_5",
                reference=ReferenceRisks(edges=(0.5,), shares=(0.5, 0.5)),
            ),
            "response": ResponseRule(
                head="answer",
                pooling=Pooling(kind="max_window", window=3),
                calibration=Platt(slope=1.0, intercept=0.0),
                operating_points=points,
                default="fpr_1",
            ),
            "model": ModelIdentity(
                model_id="tiny",
                revision="",
                config_digest="c" * 64,
                weights_fingerprint="f" * 64,
                tokenizer_sha256="a" * 64,
                chat_template_sha256="b" * 64,
                dtype="float32",
                num_layers=3,
                intermediate_size=48,
                hidden_size=32,
                vocab_size=VOCAB,
            ),
            "training": {"command": "none", "seed": "0"},
            "evaluation": (),
            "reliability": (),
            "not_good_for": ("anything",),
            "libraries": {"torch": "2"},
            "created": "2026-01-01",
            "tensors_sha256": "",
            "known_answers": build([(1, 2, 3)], lambda ids: [(0.25, -0.5)] * len(ids)),
        }
        return ProbeCard(**{**fields, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def make_probe(make_card: Callable[..., ProbeCard]) -> Callable[..., Probe]:
    """`count` random neurons spread over `ffns`, two heads; keyword arguments change the card."""

    def make(
        ffns: tuple[FFN, ...] | None = None, *, count: int = 20, seed: int = 0, **changes: object
    ) -> Probe:
        rng = np.random.default_rng(seed)
        layers = 3 if ffns is None else len(ffns)
        width = 48 if ffns is None else ffns[0].intermediate_size
        flat = rng.choice(layers * width, size=count, replace=False)
        layer, neuron = flat // width, flat % width
        norms = np.ones(count)
        card = make_card(**changes)
        if ffns is not None:
            norms = np.array(
                [float(ffns[at].column_norms()[j]) for at, j in zip(layer, neuron, strict=True)]
            )
            model = card.model
            card = make_card(
                **{
                    **changes,
                    "model": ModelIdentity(
                        model_id=model.model_id,
                        revision=model.revision,
                        config_digest=model.config_digest,
                        weights_fingerprint=model.weights_fingerprint,
                        tokenizer_sha256=model.tokenizer_sha256,
                        chat_template_sha256=model.chat_template_sha256,
                        dtype=str(ffns[0].weight.dtype).removeprefix("torch."),
                        num_layers=layers,
                        intermediate_size=width,
                        hidden_size=ffns[0].hidden_size,
                        vocab_size=VOCAB,
                    ),
                }
            )
        return Probe.make(
            card,
            layer=layer,
            neuron=neuron,
            weight=rng.normal(size=(count, len(card.heads))) * 3,
            column_norm=norms,
            bias=rng.normal(size=len(card.heads)),
        )

    return make


@pytest.fixture
def llama(make_model: Callable[[str], nn.Module]) -> nn.Module:
    return make_model("llama")


@pytest.fixture
def ffns(llama: nn.Module) -> tuple[FFN, ...]:
    return find_ffns(llama)


@pytest.fixture(scope="session")
def plain_cett() -> Callable[..., list[torch.Tensor]]:
    """CETT of every neuron per layer, written from the formula with plain hooks.

    `alphas` [rows] and `masks` [layers][neurons] suppress as the design says: z is read before, h
    after. Independent of `probes` but for the list of modules. [batch, tokens, neurons] each.
    """

    def run(
        model: nn.Module,
        ffns: tuple[FFN, ...],
        ids: torch.Tensor,
        *,
        alphas: torch.Tensor | None = None,
        masks: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        batch = ids.shape[0]
        values: dict[int, torch.Tensor] = {}
        seen: dict[int, torch.Tensor] = {}
        handles = []
        for at, ffn in enumerate(ffns):

            def before(module, args, *, at=at):
                z = args[0]
                seen[at] = z
                if alphas is None:
                    return None
                rows = alphas.repeat_interleave(z.numel() // z.shape[-1] // batch)[:, None]
                factor = torch.where(masks[at], rows, torch.ones_like(rows))
                return (z * factor.reshape(*z.shape[:-1], -1).to(z.dtype),)

            def after(module, args, output, *, at=at, ffn=ffn):
                weight = ffn.module.weight.double()
                norms = (weight.T if ffn.transposed else weight).square().sum(0).sqrt()
                share = seen[at].double().abs() * norms
                share = share / (output.double().square().sum(-1, keepdim=True).sqrt() + 1e-8)
                values[at] = share.reshape(batch, -1, share.shape[-1])

            handles += [
                ffn.module.register_forward_pre_hook(before),
                ffn.module.register_forward_hook(after),
            ]
        with torch.no_grad():
            model(ids)
        for handle in handles:
            handle.remove()
        return [values[at] for at in range(len(ffns))]

    return run
