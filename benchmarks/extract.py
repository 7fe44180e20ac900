"""What batched extraction gains over one sequence at a time, and whether its memory grows.

    python benchmarks/extract.py [FOLDER | HUB-ID] [--answers 128] [--rounds 3]

Two contestants take turns over the same token ids. `reference` is the way of the paper's code: one
sequence at a time, all logits, hooks that keep every layer's activations, CETT of every token of
the prompt too, one file per answer. `ours` is `offline.extract`. Tokens are those of prompts and
answers; of CPU seconds too, which a busy machine does not stretch. `arithmetic` is how many times
fewer multiplications by weights `ours` makes for the same tokens: what a machine gains that is busy
all the time. More than that is had only where one sequence cannot keep it busy. Memory is the peak
of a fresh process that extracts 1, 2 and 4 times the answers, and loads the model. The last line is
one JSON object.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from offline.extract import Item, extract
from offline.models import LoadedModel, load_model, load_tokenizer
from offline.reader import common_start
from offline.shards import Kind, features_header
from server.demo_model import ensure_demo_model

# Written tokens per answer: nine short answers, then a long one (the demo model's answers to the
# questions of the shipped probe have 24 on average).
LENGTHS = (6, 8, 9, 11, 13, 15, 18, 24, 32, 100)
MIB = 2**20


def make_corpus(model: str, loaded: LoadedModel, answers: int) -> list[Item]:
    """Random answers to questions of 5 to 24 random tokens, put through the chat template."""
    tokenizer = load_tokenizer(model, revision=None).tokenizer
    generator = torch.Generator().manual_seed(0)

    def random_ids(count: int) -> list[int]:
        return torch.randint(1000, 20_000, (count,), generator=generator).tolist()

    corpus = []
    for number in range(answers):
        question = str(tokenizer.decode(random_ids(5 + number % 20)))
        prompt: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        written = random_ids(LENGTHS[number % len(LENGTHS)])
        kinds = (Kind.SCAFFOLD,) * len(written)
        corpus.append(Item(f"a/b/{number}/0", tuple(prompt), tuple(written), kinds))
    return corpus


class KeepEverything:
    """The reference's hooks: z and the output norm of every layer, until they are asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.activations: list[Tensor] = []
        self.norms: list[Tensor] = []
        projections = [m for name, m in model.named_modules() if name.endswith("down_proj")]
        self.column_norms = torch.stack([m.weight.data.norm(dim=0) for m in projections])
        for module in projections:
            module.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.activations.append(args[0].detach().squeeze(0))
        self.norms.append(output.detach().norm(dim=-1, keepdim=True).squeeze(0))

    def cett(self) -> Tensor:
        """`[layers, tokens, neurons]`."""
        z = torch.stack(self.activations).transpose(0, 1)
        norms = torch.stack(self.norms).transpose(0, 1)
        self.activations.clear()
        self.norms.clear()
        return (z.abs() * self.column_norms / (norms + 1e-8)).transpose(0, 1)


def extract_reference(loaded: LoadedModel, corpus: list[Item], folder: Path) -> None:
    """Mean CETT of the answer, one answer at a time."""
    hooks = KeepEverything(loaded.model)
    for number, item in enumerate(corpus):
        with torch.no_grad():
            loaded.model(torch.tensor([item.prompt + item.written], device=loaded.model.device))
        mean = hooks.cett()[:, len(item.prompt) :].mean(dim=1).cpu().float()
        save_file({"mean": mean}, folder / f"{number}.safetensors")


def extract_ours(loaded: LoadedModel, corpus: list[Item], folder: Path) -> None:
    header = features_header(loaded.identity, "read", "benchmark", dtype="float16")
    extract(loaded.model, corpus, folder, header=header)


def saved_arithmetic(model: PreTrainedModel, corpus: list[Item]) -> float:
    """Multiplications by weights, reference over ours: it runs every token of every sequence
    through all layers and the vocabulary; we, what is not shared, and only answers' ends there."""
    embeddings: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head: int = embeddings.weight.numel()
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    start = len(common_start([item.prompt for item in corpus]))
    prompts = {item.prompt for item in corpus}
    written = sum(len(item.written) + 1 for item in corpus)  # and the last token of the prompt
    read = start + sum(len(prompt) - start - 1 for prompt in prompts) + written
    every = sum(item.length for item in corpus)
    return every * (layers + head) / (read * layers + written * head)


CONTESTANTS: dict[str, Callable[[LoadedModel, list[Item], Path], None]] = {
    "reference": extract_reference,
    "ours": extract_ours,
}


def load(model: str) -> LoadedModel:
    return load_model(model, revision=None, tokenizer=load_tokenizer(model, revision=None))


def peak_mib(model: str, answers: int, queue: multiprocessing.Queue[int]) -> None:
    """Runs in a process of its own, whose peak nothing else has touched."""
    loaded = load(model)
    folder = Path(tempfile.mkdtemp())
    extract_ours(loaded, make_corpus(model, loaded, answers), folder)
    shutil.rmtree(folder)
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // MIB)


def main(
    model: Annotated[str, typer.Argument(help="folder or hub id (default: the demo model)")] = "",
    answers: Annotated[int, typer.Option(min=10)] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Print tokens/s of both and the peaks."""
    model = model or str(ensure_demo_model())
    loaded = {name: load(model) for name in CONTESTANTS}  # hooks of one must not run in the other
    corpus = make_corpus(model, loaded["ours"], answers)
    tokens = sum(item.length for item in corpus)
    for name, contestant in CONTESTANTS.items():  # warm up
        with tempfile.TemporaryDirectory() as folder:
            contestant(loaded[name], corpus[:10], Path(folder))
    rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    cpu_rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name, contestant in CONTESTANTS.items():
            with tempfile.TemporaryDirectory() as folder:
                started, cpu = time.perf_counter(), time.process_time()
                contestant(loaded[name], corpus, Path(folder))
                rates[name].append(tokens / (time.perf_counter() - started))
                cpu_rates[name].append(tokens / (time.process_time() - cpu))
    gains = {}
    for unit, found in (("s", rates), ("CPU s", cpu_rates)):
        pairs = zip(found["ours"], found["reference"], strict=True)
        gains[unit] = statistics.median(ours / reference for ours, reference in pairs)
        for name, values in found.items():
            print(f"{name:<12}{statistics.median(values):>8.0f} tokens/{unit}", flush=True)
        print(f"gain{gains[unit]:>16.1f} times")
    arithmetic = saved_arithmetic(loaded["ours"].model, corpus)
    print(f"arithmetic{arithmetic:>10.1f} times")
    peaks = {}
    context = multiprocessing.get_context("spawn")
    for times in (1, 2, 4):
        queue: multiprocessing.Queue[int] = context.Queue()
        child = context.Process(target=peak_mib, args=(model, times * answers, queue))
        child.start()
        peaks[times * answers] = queue.get()
        child.join()
        print(f"{times * answers:>6} answers: peak {peaks[times * answers]:>6} MiB")
    result = {
        "benchmark": "extract",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": Path(model).name,
        "dtype": loaded["ours"].identity.dtype,
        "device": str(loaded["ours"].model.device),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "answers": answers,
        "tokens": tokens,
        "rounds": rounds,
        "tokens_per_s": {name: statistics.median(found) for name, found in rates.items()},
        "tokens_per_cpu_s": {name: statistics.median(found) for name, found in cpu_rates.items()},
        "gain": gains["s"],
        "gain_cpu": gains["CPU s"],
        "arithmetic": arithmetic,
        "peak_mib": peaks,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
