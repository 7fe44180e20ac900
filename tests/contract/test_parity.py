"""Served logits are those of the formula (Done-when 3, I7).

The reference is written here from the formula, with plain hooks on a plain transformers model, and
teacher-forces prompt and answer one request at a time. It shares no code with `probes/` but the
list of which module is a layer's down projection, which it finds by its own table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn

from probes.calibration import OperatingPoint, Platt
from probes.card import ModelIdentity, ProbeCard, ResponseRule, TokenRule
from probes.probe import Probe
from probes.spans import Pooling
from server.engines.base import GenerationRequest, Sampling, ScoreRequest, Step
from server.engines.loader import load_transformers_engine

VOCAB = 128
IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OLD = {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NEW = {**OLD, "intermediate_size": 48, "max_position_embeddings": 512}
GROUPS = {**NEW, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 16, "query_pre_attn_scalar": 16, "head_dim": 16}


@dataclass(frozen=True)
class Family:
    config: Callable[[], hf.PretrainedConfig]
    down: str  # the down projection of layer {}
    transposed: bool = False


FAMILIES = {
    "llama": Family(lambda: hf.LlamaConfig(**GROUPS), "model.layers.{}.mlp.down_proj"),
    "mistral": Family(
        lambda: hf.MistralConfig(**GROUPS, sliding_window=16), "model.layers.{}.mlp.down_proj"
    ),
    "qwen2": Family(lambda: hf.Qwen2Config(**GROUPS), "model.layers.{}.mlp.down_proj"),
    "qwen3": Family(lambda: hf.Qwen3Config(**GROUPS, head_dim=8), "model.layers.{}.mlp.down_proj"),
    "gemma2": Family(lambda: hf.Gemma2Config(**GROUPS, **WINDOW), "model.layers.{}.mlp.down_proj"),
    "gemma3": Family(
        lambda: hf.Gemma3TextConfig(**{**GROUPS, **WINDOW, "num_hidden_layers": 7}),
        "model.layers.{}.mlp.down_proj",
    ),
    "phi3": Family(lambda: hf.Phi3Config(**GROUPS), "model.layers.{}.mlp.down_proj"),
    "olmo2": Family(lambda: hf.Olmo2Config(**GROUPS), "model.layers.{}.mlp.down_proj"),
    "gpt2": Family(
        lambda: hf.GPT2Config(**IDS, n_positions=512, n_embd=32, n_layer=2, n_head=4),
        "transformer.h.{}.mlp.c_proj",
        transposed=True,
    ),
    "gpt_neox": Family(lambda: hf.GPTNeoXConfig(**NEW), "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "opt": Family(
        lambda: hf.OPTConfig(
            **OLD, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=512
        ),
        "model.decoder.layers.{}.fc2",
    ),
    "falcon": Family(
        lambda: hf.FalconConfig(**OLD, ffn_hidden_size=48), "transformer.h.{}.mlp.dense_4h_to_h"
    ),
    "bloom": Family(
        lambda: hf.BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=4),
        "transformer.h.{}.mlp.dense_4h_to_h",
    ),
}
LIMIT = {"float32": 1e-4, "bfloat16": 0.03}


@dataclass(frozen=True)
class Reference:
    """The model by itself; `probe` is used only for its numbers."""

    model: nn.Module
    downs: list[nn.Module]
    transposed: bool

    def norms(self) -> Tensor:
        """[layers, neurons] float64: length of each neuron's column."""
        weights = [down.weight.double() for down in self.downs]
        return torch.stack([w.square().sum(1 if self.transposed else 0).sqrt() for w in weights])

    def logits(self, token_ids: Sequence[int], probe: Probe, alpha: float) -> Tensor:
        """[tokens, heads]: bias + sum of weight * |z| * ||column|| / (||h|| + 1e-8)."""
        z: dict[int, Tensor] = {}
        length: dict[int, Tensor] = {}
        handles = []
        for layer, down in enumerate(self.downs):
            marked = probe.neuron[(probe.layer == layer) & probe.suppress]

            def before(module, args, *, layer=layer, marked=marked):
                z[layer] = args[0].reshape(-1, args[0].shape[-1])
                if alpha == 1:
                    return None
                scaled = args[0].clone()
                scaled[..., marked] *= alpha
                return (scaled,)

            def after(module, args, output, *, layer=layer):
                # Now: falcon adds the attention's output in place afterwards.
                flat = output.reshape(-1, output.shape[-1])
                length[layer] = flat.double().square().sum(-1).sqrt()

            handles += [
                down.register_forward_pre_hook(before),
                down.register_forward_hook(after),
            ]
        with torch.inference_mode():
            self.model(torch.tensor([list(token_ids)]))
        for handle in handles:
            handle.remove()
        norms = self.norms()
        total = probe.bias.double().expand(len(token_ids), -1).clone()
        for layer, neuron, weight in zip(
            probe.layer.tolist(), probe.neuron.tolist(), probe.weight.double(), strict=True
        ):
            size = z[layer][:, neuron].double().abs() * norms[layer, neuron]
            share = size / (length[layer] + 1e-8)
            total += share[:, None] * weight
        return total


def make_folder(family: Family, folder: Path, dtype: str) -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(family.config(), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w2").save_pretrained(folder)


def reference_of(folder: Path, down: str, *, transposed: bool) -> Reference:
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.eval().requires_grad_(False)
    layers = model.config.num_hidden_layers
    downs = [model.get_submodule(down.format(layer)) for layer in range(layers)]
    return Reference(model, downs, transposed)


def make_probe(identity: ModelIdentity, norms: Tensor, *, name: str, seed: int) -> Probe:
    """40 random neurons whose logits spread by about one half over the tokens of a tiny model.

    The limit in bfloat16 is absolute while its noise grows with the weights. Most families stay
    under 1e-6; plain Gemma 3 differs from itself by 0.06 of a spread of 1 when its text is 6 tokens
    longer, because the CPU's attention kernel then cuts its blocks elsewhere.
    """
    generator = torch.Generator().manual_seed(seed)
    layers, width = norms.shape
    chosen = torch.randperm(layers * width, generator=generator)[:40].sort().values
    layer, neuron = chosen // width, chosen % width
    platt = Platt(slope=1.0, intercept=0.0)
    point = OperatingPoint(name="half", threshold=0.5, false_positive_rate=0.1, recall=0.5)
    rule = {"calibration": platt, "operating_points": (point,), "default": "half"}
    card = ProbeCard(
        schema_version=1,
        formula_version=1,
        name=name,
        position="read",
        heads=("token", "answer"),
        token=TokenRule(head="token", **rule),
        response=ResponseRule(head="answer", pooling=Pooling(kind="max"), **rule),
        model=identity,
        training={},
        evaluation=(),
        reliability=(),
        not_good_for=(),
        libraries={},
        created="2026-11-23",
        tensors_sha256="",
        known_answers=(),
    )
    return Probe.make(
        card,
        layer=layer.numpy(),
        neuron=neuron.numpy(),
        weight=torch.randn(40, 2, generator=generator).numpy() / 2,
        column_norm=norms[layer, neuron].numpy(),
        bias=torch.randn(2, generator=generator).numpy(),
    )


def random_prompts() -> list[list[int]]:
    lengths = (1, 30, 300, 7, 2, 64, 3, 150, 31, 12, 5, 18, 90, 40, 8)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def make_requests(prompts: Sequence[Sequence[int]], tokens: int) -> list[GenerationRequest]:
    """Greedy and sampled, both probes, every alpha, with and without the hidden step, n=2."""
    requests = [
        GenerationRequest(
            request_id=str(number),
            prompt_token_ids=tuple(prompt),
            max_tokens=tokens + number % 3,
            sampling=Sampling(
                temperature=0.0 if number % 2 else 0.9, seed=number, ignore_eos=number % 4 != 0
            ),
            probe=("one", "two")[number // 2 % 2],
            alpha=(1.0, 1.0, 0.0, 0.5, 2.0, 1.0)[number % 6],
            read_last=number % 3 != 2,
        )
        for number, prompt in enumerate(prompts)
    ]
    twin = requests[0]  # what `n=2` becomes
    return [*requests, replace(twin, sampling=replace(twin.sampling, seed=1))]


async def serve(
    folder: Path, probes: Sequence[Probe], requests: Sequence[GenerationRequest], **options: object
) -> tuple[list[list[Step]], list[Tensor]]:
    """Steps of every request, sent at once, and the scores of prompt and answer given as text."""
    engine = load_transformers_engine(
        folder, model_id="parity", probes=probes, device="cpu", **options
    )

    async def generate(request: GenerationRequest) -> list[Step]:
        return [step async for step in engine.generate(request)]

    async def score(request: GenerationRequest, steps: Sequence[Step]) -> Tensor:
        readings = await engine.score(
            ScoreRequest(
                request_id=request.request_id,
                token_ids=all_tokens(request, steps),
                start=0,
                probe=request.probe or "",
                alpha=request.alpha,
            )
        )
        return torch.tensor([reading.logits for reading in readings], dtype=torch.float64)

    try:
        served = await asyncio.gather(*map(generate, requests))
        scored = await asyncio.gather(*map(score, requests, served))
    finally:
        await engine.aclose()
    return served, scored


def all_tokens(request: GenerationRequest, steps: Sequence[Step]) -> tuple[int, ...]:
    written = (step.token_id for step in steps if step.token_id is not None)
    return (*request.prompt_token_ids, *written)


def worst_difference(
    reference: Reference,
    probes: Sequence[Probe],
    requests: Sequence[GenerationRequest],
    served: Sequence[Sequence[Step]],
    scored: Sequence[Tensor],
) -> float:
    """Largest |logit - expected|; fails where a reading is missing or misplaced."""
    by_name = {probe.card.name: probe for probe in probes}
    worst = 0.0
    for request, steps, scores in zip(requests, served, scored, strict=True):
        tokens = all_tokens(request, steps)
        first = len(request.prompt_token_ids) - 1
        positions = [step.reading.position for step in steps if step.reading]
        ended_by_length = steps[-1].finish_reason == "length"
        last = len(tokens) - (1 if ended_by_length and request.read_last else 2)
        assert positions == list(range(first, last + 1))
        expected = reference.logits(tokens, by_name[request.probe or ""], request.alpha)
        logits = torch.tensor([step.reading.logits for step in steps if step.reading])
        worst = max(worst, float((logits - expected[first : last + 1]).abs().max()))
        worst = max(worst, float((scores - expected).abs().max()))
    return worst


async def identity_of(folder: Path, **options: object) -> ModelIdentity:
    engine = load_transformers_engine(folder, model_id="parity", device="cpu", **options)
    await engine.aclose()
    return engine.card.identity


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
async def test_served_logits_equal_the_formula(name, dtype, tmp_path):
    """A wrong layer, column, mask, position, row or order of suppression in any family."""
    family = FAMILIES[name]
    make_folder(family, tmp_path, dtype)
    reference = reference_of(tmp_path, family.down, transposed=family.transposed)
    identity = await identity_of(tmp_path)
    probes = [
        make_probe(identity, reference.norms(), name=label, seed=seed)
        for seed, label in enumerate(("one", "two"))
    ]
    requests = make_requests(random_prompts(), 5)
    for batch, some in ((1, requests[:5]), (4, requests[3:11]), (16, requests)):
        served, scored = await serve(tmp_path, probes, some, max_num_seqs=batch)
        worst = worst_difference(reference, probes, some, served, scored)
        assert worst <= LIMIT[dtype], f"batch {batch}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_served_logits_equal_the_formula_on_the_demo_model(
    demo_model_path, repository, dtype
):
    """The same on real weights and English text, whose activations are far from random ones."""
    reference = reference_of(demo_model_path, "model.layers.{}.mlp.down_proj", transposed=False)
    reference.model.to(getattr(torch, dtype))
    identity = await identity_of(demo_model_path, dtype=dtype)
    probes = [
        make_probe(identity, reference.norms(), name=label, seed=seed)
        for seed, label in enumerate(("one", "two"))
    ]
    tokenizer = hf.AutoTokenizer.from_pretrained(demo_model_path)
    text = tokenizer((repository / "LICENSE").read_text()).input_ids
    lengths = (1, 24, 300, 9, 33, 14, 60, 20, 5, 40, 11, 28, 17, 8, 22)
    requests = make_requests([text[50 * i :][:n] for i, n in enumerate(lengths)], 4)
    for batch, some in ((1, requests[4:5]), (4, requests[3:7]), (16, requests)):
        served, scored = await serve(demo_model_path, probes, some, max_num_seqs=batch, dtype=dtype)
        worst = worst_difference(reference, probes, some, served, scored)
        assert worst <= LIMIT[dtype], f"batch {batch}"
