"""What runs inside vLLM's processes: workers with a meter, a scheduler that hands readings on.

vLLM finds these classes by their dotted names. A worker's model runner is wrapped where it learns
of requests, where it has laid out the rows of a pass, and where it hands out what the pass gave.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from probes.errors import ModelError
from server.engines.vllm.meter import Pending, Readings, WorkerMeter
from server.engines.vllm.plan import EXTRA_ARGS_KEY, MeterPlan, Order
from server.engines.vllm.processes import end_with_server
from server.engines.vllm.refusal import leaving_why
from server.engines.vllm.repairs import keeping_idle_generators, repair

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker


VALUES = "hneurons"  # among what one stage of a pipeline hands to the next
STATISTICS_EVERY = 32  # steps; a message of 20 us
SECONDS_OF_SILENCE = 0.1  # in a pipeline an empty step follows each pass


class OwnedWorker(_Worker):
    """vLLM's worker as a part of this server, which alone hears signals and says what is wrong."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        _leave_interrupts_to_the_server()
        with leaving_why():
            super().load_model(load_dummy_weights=load_dummy_weights)
            repair(self.model_runner)
            self._prepare()

    def init_device(self) -> None:
        """What a worker does first; the engine's process ends when one of them does."""
        end_with_server()
        with leaving_why():
            super().init_device()

    def determine_available_memory(self) -> int:
        """Where the model is compiled, and a cache that does not fit is refused."""
        with leaving_why():
            free: int = super().determine_available_memory()
            return free

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        """Where the cache is made."""
        with leaving_why():
            super().initialize_from_config(*args, **kwargs)

    def compile_or_warm_up_model(self) -> Any:
        """Where graphs are captured."""
        with leaving_why():
            return super().compile_or_warm_up_model()

    def _prepare(self) -> None:
        """The model is loaded and not compiled yet."""


class MeteredWorker(OwnedWorker):
    """Its model is metered as soon as it is loaded, before it is compiled."""

    def _prepare(self) -> None:
        plan = self.vllm_config.additional_config
        if not isinstance(plan, MeterPlan):
            raise ModelError("a metered worker was started without a plan of what to read")
        if not isinstance(self.model_runner, GPUModelRunner):
            raise ModelError(f"the rows of {type(self.model_runner)} are not known to the meter")
        config = self.vllm_config
        first, end = config.model_config.get_layers_start_end_indices(config.parallel_config)
        meter = WorkerMeter(
            self.model_runner.model,
            plan,
            layers=range(first, end),
            max_tokens=config.scheduler_config.max_num_batched_tokens,
        )
        wrap(self.model_runner, meter)


def wrap(runner: Any, meter: WorkerMeter) -> None:
    """Let the meter see every real pass of vLLM's model runner (dummy passes lay out no rows)."""
    execute: Callable[..., Any] = runner.execute_model
    prepare: Callable[..., Any] = runner._prepare_inputs
    sample: Callable[..., Any] = runner.sample_tokens

    def execute_model(scheduler_output: Any, earlier: Any = None) -> Any:
        meter.learn(scheduler_output)
        if earlier is not None:  # from the stage before; what is ours the model does not know
            meter.receive(earlier.tensors.pop(VALUES, None))
        output = execute(scheduler_output, earlier)
        if isinstance(output, IntermediateTensors) and (values := meter.values()) is not None:
            # A copy: the dictionary may be that of a captured graph.
            return IntermediateTensors({**output.tensors, VALUES: values.contiguous()})
        return output

    def prepare_inputs(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(scheduler_output, *args, **kwargs)
        batch = runner.input_batch
        meter.begin(
            batch.req_ids[: batch.num_reqs],
            scheduler_output.num_scheduled_tokens,
            scheduler_output.scheduled_spec_decode_tokens,
        )
        return prepared

    @torch.inference_mode()
    def sample_tokens(*args: Any, **kwargs: Any) -> Any:
        pending = meter.read(runner.positions)
        with keeping_idle_generators(runner):
            output = sample(*args, **kwargs)
        return _attach(output, pending)

    runner.execute_model = execute_model
    runner._prepare_inputs = prepare_inputs
    runner.sample_tokens = sample_tokens


def _attach(output: Any, pending: Pending | None) -> Any:
    if pending is None:
        return output
    if isinstance(output, AsyncModelRunnerOutput):
        return _Later(output, pending)
    if isinstance(output, ModelRunnerOutput) and output is not EMPTY_MODEL_RUNNER_OUTPUT:
        output.hneurons = pending.take()
    return output


class _Later(AsyncModelRunnerOutput):
    """An output that is still on its way from the device, with its readings."""

    def __init__(self, output: AsyncModelRunnerOutput, pending: Pending) -> None:
        self._output, self._pending = output, pending

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        output.hneurons = self._pending.take()
        return output


class _HandsOn:
    """Mixin for vLLM's schedulers: a step's readings leave as one vector on its first output.

    The vector begins with the number of numbers that belong to each output of the step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._chunks: dict[str, list[Any]] = {}  # readings of prompts that are read in chunks
        self._steps = 0
        self._last_word = 0.0  # when something was put out
        self._totals = dict.fromkeys(("preempted", "drafted", "accepted"), 0)

    def update_from_output(
        self, scheduler_output: Any, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        readings: Readings | None = getattr(model_runner_output, "hneurons", None)
        by_client: dict[int, EngineCoreOutputs] = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        self._count(scheduler_output, by_client)
        if readings is not None:
            segments = {
                request_id: readings.data[readings.bounds[i] : readings.bounds[i + 1]]
                for request_id, i in model_runner_output.req_id_to_index.items()
            }
            self._keep_chunks(segments, by_client)
            drafts = scheduler_output.scheduled_spec_decode_tokens
            for outputs in by_client.values():
                if drafts:
                    _leave_out_rejected(outputs.outputs, segments, drafts)
                self._hand_on(outputs.outputs, segments)
        now = time.monotonic()
        if any(outputs.outputs for outputs in by_client.values()):
            self._last_word = now
        is_silent = now - self._last_word > SECONDS_OF_SILENCE
        self._steps += 1
        if is_silent or self._steps % STATISTICS_EVERY == 0:
            # A long prompt is read in many steps that put nothing out, and no sign of life is a
            # hang. vLLM's client drops what has neither outputs nor statistics.
            self._last_word = now
            by_client.setdefault(0, EngineCoreOutputs()).scheduler_stats = SchedulerStats(
                kv_cache_usage=self.kv_cache_manager.usage,  # type: ignore[attr-defined]
                kv_connector_stats=dict(self._totals),  # for anything; connectors are refused
            )
        return by_client

    def _count(self, scheduler_output: Any, by_client: dict[int, EngineCoreOutputs]) -> None:
        self._totals["preempted"] += len(scheduler_output.preempted_req_ids or ())
        drafts = scheduler_output.scheduled_spec_decode_tokens
        for output in (o for outputs in by_client.values() for o in outputs.outputs):
            if drafted := drafts.get(output.request_id):
                refused = scheduler_output.num_invalid_spec_tokens or {}  # by a grammar
                self._totals["drafted"] += len(drafted) - refused.get(output.request_id, 0)
                self._totals["accepted"] += max(0, len(output.new_token_ids) - 1)

    def _keep_chunks(self, segments: dict[str, Any], by_client: dict[int, Any]) -> None:
        """Prompts that are read as a whole: gather their readings until the request puts out."""
        emitting = {out.request_id for outs in by_client.values() for out in outs.outputs}
        for request_id in list(self._chunks):
            if request_id not in self.requests:  # type: ignore[attr-defined]
                chunks = self._chunks.pop(request_id)
                if request_id in emitting and request_id in segments:
                    segments[request_id] = np.concatenate([*chunks, segments[request_id]])
        for request_id in segments.keys() - emitting:
            request = self.requests.get(request_id)  # type: ignore[attr-defined]
            extra = request and request.sampling_params and request.sampling_params.extra_args
            if extra and Order(*extra[EXTRA_ARGS_KEY]).whole_prompt:
                self._chunks.setdefault(request_id, []).append(segments[request_id])

    @staticmethod
    def _hand_on(outputs: list[EngineCoreOutput], segments: dict[str, Any]) -> None:
        if not outputs:
            return
        nothing = np.empty(0, dtype=np.float32)
        parts = [segments.get(output.request_id, nothing) for output in outputs]
        lengths = np.array([len(part) for part in parts], dtype=np.float32)
        outputs[0].routed_experts = np.concatenate([lengths, *parts])


def _leave_out_rejected(
    outputs: list[EngineCoreOutput], segments: dict[str, Any], drafts: dict[str, list[int]]
) -> None:
    """Of a request with drafts: one reading per new token. The rows behind were fed drafts that do
    not stand, or that come after the end of the answer."""
    for output in outputs:
        if (drafted := drafts.get(output.request_id)) and output.request_id in segments:
            readings = segments[output.request_id].reshape(1 + len(drafted), -1)
            segments[output.request_id] = readings[: len(output.new_token_ids)].reshape(-1)


class _MeteredScheduler(_HandsOn, Scheduler):
    pass


class _MeteredAsyncScheduler(_HandsOn, AsyncScheduler):
    pass


def make_scheduler(**arguments: Any) -> Scheduler:
    """What vLLM calls in the engine's process for a scheduler."""
    _leave_interrupts_to_the_server()
    end_with_server()
    asynchronous = arguments["vllm_config"].scheduler_config.async_scheduling
    return (_MeteredAsyncScheduler if asynchronous else _MeteredScheduler)(**arguments)


def _leave_interrupts_to_the_server() -> None:
    """Ctrl-C reaches every process of a terminal: the server alone decides what that means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
