"""The oracle of all engines: plain transformers, teacher-forced, and the formula written anew.

Shares no code with `probes/`: which module is a layer's down projection stands in a table here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn

from probes.card import ModelIdentity
from probes.probe import Probe
from probes.random_probe import random_probe
from server.engines.base import GenerationRequest, Sampling, Step

VOCAB = 128
IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LIMIT = {"float32": 1e-4, "bfloat16": 0.03}


@dataclass(frozen=True)
class Family:
    config: Callable[[], hf.PretrainedConfig]
    down: str  # the down projection of layer {}
    transposed: bool = False


def families(hidden: int, *, head_dim: int, neurons: int = 48) -> dict[str, Family]:
    """Tiny models of four heads; `head_dim` is that of the families which set it apart, `neurons`
    the width of the feed-forward layers of those with a gate."""
    old = {**IDS, "hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 4}
    new = {**old, "intermediate_size": neurons, "max_position_embeddings": 512}
    groups = {**new, "num_key_value_heads": 2}
    window = {"sliding_window": 16, "query_pre_attn_scalar": head_dim, "head_dim": head_dim}
    return {
        "llama": Family(lambda: hf.LlamaConfig(**groups), "model.layers.{}.mlp.down_proj"),
        "mistral": Family(
            lambda: hf.MistralConfig(**groups, sliding_window=16), "model.layers.{}.mlp.down_proj"
        ),
        "qwen2": Family(lambda: hf.Qwen2Config(**groups), "model.layers.{}.mlp.down_proj"),
        "qwen3": Family(
            lambda: hf.Qwen3Config(**groups, head_dim=hidden // 4), "model.layers.{}.mlp.down_proj"
        ),
        "gemma2": Family(
            lambda: hf.Gemma2Config(**groups, **window), "model.layers.{}.mlp.down_proj"
        ),
        "gemma3": Family(
            lambda: hf.Gemma3TextConfig(**{**groups, **window, "num_hidden_layers": 7}),
            "model.layers.{}.mlp.down_proj",
        ),
        "phi3": Family(lambda: hf.Phi3Config(**groups), "model.layers.{}.mlp.down_proj"),
        "olmo2": Family(lambda: hf.Olmo2Config(**groups), "model.layers.{}.mlp.down_proj"),
        "gpt2": Family(
            lambda: hf.GPT2Config(**IDS, n_positions=512, n_embd=hidden, n_layer=2, n_head=4),
            "transformer.h.{}.mlp.c_proj",
            transposed=True,
        ),
        "gpt_neox": Family(lambda: hf.GPTNeoXConfig(**new), "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
        "opt": Family(
            lambda: hf.OPTConfig(
                **old, ffn_dim=48, word_embed_proj_dim=hidden, max_position_embeddings=512
            ),
            "model.decoder.layers.{}.fc2",
        ),
        "falcon": Family(
            lambda: hf.FalconConfig(**old, ffn_hidden_size=48), "transformer.h.{}.mlp.dense_4h_to_h"
        ),
        "bloom": Family(
            lambda: hf.BloomConfig(**IDS, hidden_size=hidden, n_layer=2, n_head=4),
            "transformer.h.{}.mlp.dense_4h_to_h",
        ),
    }


@dataclass(frozen=True)
class Reference:
    """The model by itself; `probe` is used only for its numbers."""

    model: nn.Module
    downs: list[nn.Module]
    transposed: bool

    @cached_property
    def norms(self) -> Tensor:
        """[layers, neurons] float64: length of each neuron's column."""
        weights = [down.weight.double() for down in self.downs]
        return torch.stack([w.square().sum(1 if self.transposed else 0).sqrt() for w in weights])

    def logits(self, token_ids: Sequence[int], probe: Probe, alpha: float) -> Tensor:
        """[tokens, heads]: bias + sum of weight * |z| * ||column|| / (||h|| + 1e-8)."""
        return self.read(token_ids, probe, alpha)[0]

    def read(
        self, token_ids: Sequence[int], probe: Probe, alpha: float
    ) -> tuple[Tensor, list[int]]:
        """The probe's logits of every token, and the token that the model would write after it."""
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
            written = self.model(torch.tensor([list(token_ids)])).logits[0].argmax(-1).tolist()
        for handle in handles:
            handle.remove()
        total = probe.bias.double().expand(len(token_ids), -1).clone()
        for layer, neuron, weight in zip(
            probe.layer.tolist(), probe.neuron.tolist(), probe.weight.double(), strict=True
        ):
            size = z[layer][:, neuron].double().abs() * self.norms[layer, neuron]
            share = size / (length[layer] + 1e-8)
            total += share[:, None] * weight
        return total, written


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
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # the library's sdpa leaves the cap out
    layers = model.config.num_hidden_layers
    downs = [model.get_submodule(down.format(layer)) for layer in range(layers)]
    return Reference(model, downs, transposed)


def make_probe(identity: ModelIdentity, norms: Tensor, *, name: str, seed: int) -> Probe:
    """40 random neurons whose logits spread by about one half over the tokens of a tiny model.

    The limit in bfloat16 is absolute while its noise grows with the weights. Most families stay
    under 1e-6; plain Gemma 3 differs from itself by 0.06 of a spread of 1 when its text is 6 tokens
    longer, because the CPU's attention kernel then cuts its blocks elsewhere.
    """
    return random_probe(identity, norms, name=name, neurons=40, seed=seed, scale=0.5)


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


def all_tokens(request: GenerationRequest, steps: Sequence[Step]) -> tuple[int, ...]:
    written = (step.token_id for step in steps if step.token_id is not None)
    return (*request.prompt_token_ids, *written)


def worst_difference(
    reference: Reference,
    probes: Sequence[Probe],
    requests: Sequence[GenerationRequest],
    served: Sequence[Sequence[Step]],
    scored: Sequence[Tensor] | None,
) -> float:
    """Largest |logit - expected|; fails where a reading is missing, misplaced or not a number, or
    where a greedy token in float32 is not the reference's.
    """
    by_name = {probe.card.name: probe for probe in probes}
    worst = 0.0
    for index, (request, steps) in enumerate(zip(requests, served, strict=True)):
        tokens = all_tokens(request, steps)
        first = len(request.prompt_token_ids) - 1
        positions = [step.reading.position for step in steps if step.reading]
        ended_by_length = steps[-1].finish_reason == "length"
        last = len(tokens) - (1 if ended_by_length and request.read_last else 2)
        assert positions == list(range(first, last + 1))
        expected, greedy = reference.read(tokens, by_name[request.probe or ""], request.alpha)
        if request.sampling.temperature == 0 and reference.model.dtype == torch.float32:
            assert list(tokens[first + 1 :]) == greedy[first:-1]
        logits = torch.tensor([step.reading.logits for step in steps if step.reading])
        assert logits.isfinite().all()  # `max` passes NaN over
        worst = max(worst, float((logits - expected[first : last + 1]).abs().max()))
        if scored is not None:
            assert scored[index].isfinite().all()
            worst = max(worst, float((scored[index] - expected).abs().max()))
    return worst
