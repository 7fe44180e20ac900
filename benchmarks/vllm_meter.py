"""What the meter costs inside vLLM, apart from any model: kernels in the graph, time beside it.

    .venv-vllm/bin/python -m benchmarks.vllm_meter

One process, no engine. The first table compiles a stack of vLLM's own feed-forward layers with and
without the meter and counts Inductor's kernels. The second is the CPU time per step of everything
outside the graph (laying out rows, taking readings, the vector's way through the scheduler and
home) over the number of probed neurons and of requests; process time: neighbours count little.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch._inductor import metrics
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.v1.engine import EngineCoreOutput

from probes.card import ModelIdentity
from probes.probe import Probe
from probes.random_probe import random_probe
from server.engines.vllm.meter import WorkerMeter
from server.engines.vllm.plan import EXTRA_ARGS_KEY, MeterPlan, Order
from server.engines.vllm.tap import Reader, Tap
from server.engines.vllm.worker import _HandsOn

LAYERS, WIDTH, HIDDEN = 32, 1536, 576
NEURONS = (10, 100, 1000, 10_000)
REQUESTS = (1, 8, 64, 256)
STEPS = 200


class Block(nn.Module):
    """A gated feed-forward layer as in Llama, then the residual add and the next norm."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(HIDDEN, 2 * WIDTH, bias=False)
        self.down_proj = RowParallelLinear(
            WIDTH, HIDDEN, bias=False, prefix=f"layers.{number}.down_proj"
        )
        self.norm = nn.RMSNorm(HIDDEN)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        h, _ = self.down_proj(nn.functional.silu(gate) * up)
        residual = residual + h
        return self.norm(residual), residual


class Stack(nn.Module):
    do_not_compile = False  # vLLM's mark of what it compiles, which the meter asks for

    def __init__(self, layers: int) -> None:
        super().__init__()
        blocks = [Block(number) for number in range(layers)]
        self.layers = nn.ModuleList(blocks)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)
        downs = [block.down_proj for block in blocks]
        self.column_norms = torch.stack([down.weight.detach().norm(dim=0) for down in downs])
        for down in downs:
            down.quant_method.process_weights_after_loading(down)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x


def make_probe(model: Stack, neurons: int) -> Probe:
    """So many random neurons, spread evenly."""
    layers = len(model.layers)
    identity = ModelIdentity(
        model_id="stack",
        revision="",
        config_digest="c",
        weights_fingerprint="w",
        tokenizer_sha256="t",
        chat_template_sha256="",
        dtype="float32",
        num_layers=layers,
        intermediate_size=WIDTH,
        hidden_size=HIDDEN,
        vocab_size=2,
    )
    norms = model.column_norms
    return random_probe(identity, norms, name="stack", neurons=neurons, heads=["token"])


def make_plan(model: Stack, neurons: int, *, suppression: bool) -> MeterPlan:
    return MeterPlan(
        probes=(make_probe(model, neurons),),
        intermediate_size=WIDTH,
        hidden_size=HIDDEN,
        suppression=suppression,
    )


def kernels(layers: int, *, neurons: int, suppression: bool) -> int:
    """Inductor's kernels of a compiled stack; matrix products are not among them."""
    model = Stack(layers)
    if neurons:
        plan = make_plan(model, neurons, suppression=suppression)
        WorkerMeter(model, plan, layers=range(layers), max_tokens=64)
    torch._dynamo.reset()
    metrics.reset()
    with torch.inference_mode():
        torch.compile(model, fullgraph=True, dynamic=True)(torch.randn(32, HIDDEN))
    return metrics.generated_kernel_count


def per_layer(*, neurons: int, suppression: bool) -> int:
    """Kernels that one more layer brings."""
    counts = [kernels(n, neurons=neurons * n, suppression=suppression) for n in (2, 3)]
    return counts[1] - counts[0]


def microseconds(run: Callable[[], object]) -> float:
    """Median CPU time of one call."""
    run()
    times = []
    for _ in range(STEPS):
        started = time.process_time_ns()
        run()
        times.append((time.process_time_ns() - started) / 1000)
    return statistics.median(times)


class _Base:
    """What `_HandsOn` stands on: a scheduler that puts out one token per request."""

    requests: dict[str, object]
    kv_cache_manager = SimpleNamespace(usage=0.0)

    def update_from_output(self, scheduled: object, output: SimpleNamespace) -> object:
        outputs = [
            EngineCoreOutput(request_id=i, new_token_ids=[0]) for i in output.req_id_to_index
        ]
        return {0: SimpleNamespace(outputs=outputs)}


class _Scheduler(_HandsOn, _Base):
    pass


def step_costs(meter: WorkerMeter, plan: MeterPlan, requests: int) -> tuple[float, float, float]:
    """Worker, scheduler and server: CPU microseconds of one decoding step."""
    names = [f"r{number}" for number in range(requests)]
    order = Order(0, 1.0, 0, whole_prompt=False)
    params = SimpleNamespace(extra_args={EXTRA_ARGS_KEY: list(order)})
    new = [SimpleNamespace(req_id=name, sampling_params=params) for name in names]
    meter.learn(SimpleNamespace(finished_req_ids=names, scheduled_new_reqs=new))
    counts, positions = dict.fromkeys(names, 1), torch.arange(requests)

    def in_worker() -> object:
        meter.begin(names, counts, {})
        pending = meter.read(positions)
        assert pending is not None
        return pending.take()

    scheduler = _Scheduler()
    scheduler.requests = dict.fromkeys(names)
    output = SimpleNamespace(
        hneurons=in_worker(), req_id_to_index={name: i for i, name in enumerate(names)}
    )
    scheduled = SimpleNamespace(
        preempted_req_ids=(),
        scheduled_spec_decode_tokens={},
        num_invalid_spec_tokens=None,
    )
    by_client = scheduler.update_from_output(scheduled, output)
    vector = by_client[0].outputs[0].routed_experts
    states = {name: SimpleNamespace(external_req_id=name) for name in names}
    processor = SimpleNamespace(request_states=states)
    tap = Tap(
        SimpleNamespace(
            engine_core=SimpleNamespace(get_output_async=None), output_processor=processor
        )
    )
    tap.readers = {name: Reader(plan, order, prompt_tokens=1) for name in names}

    def at_home() -> None:
        by_client[0].outputs[0].routed_experts = vector
        tap._take(by_client[0])

    base = microseconds(lambda: _Base.update_from_output(scheduler, scheduled, output))
    handing_on = microseconds(lambda: scheduler.update_from_output(scheduled, output))
    return microseconds(in_worker), handing_on - base, microseconds(at_home)


def main() -> None:
    torch.set_num_threads(1)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29511", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        print("kernels per layer (Inductor, CPU, float32, 12 neurons per layer)")
        print(f"  without the meter          {per_layer(neurons=0, suppression=False)}", flush=True)
        print(
            f"  with the meter             {per_layer(neurons=12, suppression=False)}", flush=True
        )
        print(f"  with meter and suppression {per_layer(neurons=12, suppression=True)}", flush=True)
        print("\nCPU us per step outside the graph: worker + scheduler + server")
        print("| neurons | " + " | ".join(f"{n} requests" for n in REQUESTS) + " |")
        print("|---|" + "---|" * len(REQUESTS))
        for neurons in NEURONS:
            model = Stack(LAYERS)
            plan = make_plan(model, neurons, suppression=False)
            meter = WorkerMeter(model, plan, layers=range(LAYERS), max_tokens=max(REQUESTS))
            cells = [step_costs(meter, plan, requests) for requests in REQUESTS]
            shown = (" + ".join(f"{us:.0f}" for us in cell) for cell in cells)
            print(f"| {neurons} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
