"""From a model and vLLM's own arguments to a running `VllmEngine`, or one sentence why not."""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from probes.card import ModelIdentity
from probes.errors import ModelError
from probes.neurons import find_ffns
from probes.probe import Probe
from server.engines.base import EngineCard
from server.engines.checkpoint import (
    eos_token_ids,
    identify,
    load_tokenizer,
    load_weights,
    match_all,
    refuse_unreadable,
)
from server.engines.vllm.gate import (
    START_METHOD,
    check_signatures,
    check_version,
    refuse,
    refuse_environment,
)
from server.engines.vllm.plan import MeterPlan
from server.engines.vllm.processes import SERVER_PID
from server.engines.vllm.refusal import hearing_why

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from server.engines.vllm.engine import VllmEngine

WORKER = "server.engines.vllm.worker.OwnedWorker"
METERED_WORKER = "server.engines.vllm.worker.MeteredWorker"
SCHEDULER = "server.engines.vllm.worker.make_scheduler"
OWN_OPTIONS = {  # of vLLM -> how this server calls them; "": it sets them, and nobody else
    "model": "MODEL",
    "served_model_name": "--served-model-name",
    "revision": "--revision",
    "code_revision": "",
    "tokenizer": "",
    "tokenizer_revision": "",
    "skip_tokenizer_init": "",
    "trust_remote_code": "",
    "hf_config_path": "",
    "dtype": "--dtype",
    "max_num_seqs": "--max-num-seqs",
    "max_num_queued_reqs": "--max-waiting-requests",
    "max_num_queued_tokens": "--max-waiting-tokens",
    "max_logprobs": "",  # as many as the API allows
    "reasoning_parser": "--reasoning-parser",
    "generation_config": "",
    "override_generation_config": "",
    "disable_log_stats": "",
    "enable_log_requests": "",
    "worker_cls": "",
    "worker_extension_cls": "",
    "model_class_overrides": "",
    "scheduler_cls": "",
    "additional_config": "",
}
UNKNOWN_TO_DRAFTS = dict.fromkeys(  # vLLM: SamplingParams._validate_spec_decode
    ("min_p", "logit_bias"), "vLLM does not know it with --speculative-config"
)
KV_CACHE_BYTES_ON_CPU = 2**30  # vLLM alone would claim nearly all memory
# Read by vLLM when it is imported and by its processes; what the operator has set stays.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    # vLLM's default on GPUs is fork, which inherits the bound sockets, and the locks of a pool of
    # threads that reading the checkpoint has started: the engine's first large tensor would hang.
    START_METHOD: "spawn",
}


def load_vllm_engine(
    model_path: Path | str,
    *,
    model_id: str,
    revision: str | None = None,
    probes: Sequence[Probe] = (),
    dtype: str | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = 16,
    max_waiting_requests: int = 64,
    max_waiting_tokens: int = 65_536,
    suppression: bool = False,
    reasoning_parser: str | None = None,
    tool_call_parser: str | None = None,
    vllm_args: str = "",
) -> VllmEngine:
    """Load, check, compile and start the engine's processes. Blocks for a minute or more.

    suppression       the graph can scale neurons; every token pays for it
    reasoning_parser, tool_call_parser
                      vLLM's names of them; grammars begin to hold where the reasoning ends
    vllm_args         any of vLLM's engine arguments but OWN_OPTIONS, as on its command line

    Raises ModelError, or ProbeMismatchError when a probe belongs to another model.
    """
    check_version()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    refuse_environment(os.environ)
    check_signatures()
    model = ["--model", str(model_path)]
    if revision is not None:
        model += ["--revision", revision]
    words = shlex.split(vllm_args)
    sets_length = _check_options(model, words, sets_length=max_model_len is not None)
    refuse_unreadable(model_path, revision=revision)
    tokenizer = load_tokenizer(model_path, revision=revision)
    parsers = None
    if reasoning_parser is not None or tool_call_parser is not None:
        from server.engines.vllm.parsers import VllmParsers

        parsers = VllmParsers(tokenizer, reasoning=reasoning_parser, tool_call=tool_call_parser)
    found, ends = _identity_of(model_path, tokenizer, model_id, revision=revision, dtype=dtype)
    match_all(probes, found)
    plan = None
    if probes:
        plan = MeterPlan(
            probes=tuple(probes),
            intermediate_size=found.intermediate_size,
            hidden_size=found.hidden_size,
            suppression=suppression,
        )
    ours = [*model, "--dtype", found.dtype, "--max-num-seqs", str(max_num_seqs)]
    if reasoning_parser is not None:
        ours += ["--reasoning-parser", reasoning_parser]
    if not sets_length:  # else -1: the model's own length, or what fits into the cache
        ours += [f"--max-model-len={-1 if max_model_len is None else max_model_len}"]
    llm = _start(_engine_arguments([*words, *ours]), plan)
    from server.engines.vllm.engine import VllmEngine

    is_drafting = llm.vllm_config.speculative_config is not None
    card = EngineCard(
        engine="vllm",
        model_id=model_id,
        # One place is left for the hidden step after an answer, and for the token after a score.
        max_model_len=llm.model_config.max_model_len - 1,
        vocab_size=min(len(tokenizer), found.vocab_size),
        eos_token_ids=ends,
        dtype=found.dtype,
        identity=found,
        refused_sampling=UNKNOWN_TO_DRAFTS if is_drafting else {},
    )
    return VllmEngine(
        llm,
        tokenizer,
        card,
        plan=plan,
        parsers=parsers,
        max_waiting_requests=max_waiting_requests,
        max_waiting_tokens=max_waiting_tokens,
    )


def _identity_of(
    model_path: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    model_id: str,
    *,
    revision: str | None,
    dtype: str | None,
) -> tuple[ModelIdentity, frozenset[int]]:
    """Who the checkpoint is, from the checkpoint itself: vLLM fuses, shards and packs weights."""
    model = load_weights(model_path, revision=revision, dtype=dtype)
    found = identify(model, find_ffns(model), tokenizer, model_id=model_id)
    return found, eos_token_ids(model, tokenizer)


def _check_options(model: list[str], words: list[str], *, sets_length: bool) -> bool:
    """Whether `words` set --max-model-len, which this server may have as well, but not both.

    ModelError for an option that would be lost, or known to one of the two alone.
    """
    given, default = _engine_arguments([*model, *words]), _engine_arguments(model)
    names = {**OWN_OPTIONS, **({"max_model_len": "--max-model-len"} if sets_length else {})}
    for name, own in names.items():
        if getattr(given, name) != getattr(default, name):
            option = f"--{name.replace('_', '-')}"
            remedy = f"give {own} to this server instead" if own else "this server sets it"
            raise ModelError(f"vllm_args: {option} is refused: {remedy}")
    return bool(given.max_model_len != default.max_model_len)


def _engine_arguments(words: list[str]) -> AsyncEngineArgs:
    """vLLM's own parser; what is wrong is raised instead of ending the process."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ModelError(f"vllm_args: {message}")

    parser = AsyncEngineArgs.add_cli_args(Parser(add_help=False))
    arguments: Any = AsyncEngineArgs.from_cli_args(parser.parse_args(words))
    return arguments


def _start(arguments: AsyncEngineArgs, plan: MeterPlan | None) -> AsyncLLM:
    """vLLM's processes, up and compiled."""
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments.generation_config = "vllm"  # sampling defaults are made above the seam
    arguments.skip_tokenizer_init = False  # grammars are made of its vocabulary
    if arguments.structured_outputs_config.backend == "auto":
        # vLLM keeps the backend of its first constrained request for all: one that knows a keyword
        # of a schema would check it, and another that does not would leave it out without a word.
        arguments.structured_outputs_config.backend = "xgrammar"
    arguments.disable_log_stats = True
    arguments.enable_log_requests = False
    arguments.scheduler_cls = SCHEDULER
    arguments.worker_cls = WORKER if plan is None else METERED_WORKER
    is_sized = arguments.kv_cache_memory_bytes or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if current_platform.is_cpu() and not is_sized:
        arguments.kv_cache_memory_bytes = KV_CACHE_BYTES_ON_CPU
    os.environ[SERVER_PID] = str(os.getpid())
    _keep_sockets_together()
    try:
        config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)  # its defaults
        refuse(config)
        if current_platform.is_cpu() and (
            config.parallel_config.world_size > 1 or "OMP_NUM_THREADS" in os.environ
        ):
            # vLLM's own way of binding threads wants a NUMA node for each rank, and takes
            # another number of them than the operator has said.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if plan is not None:
            ranks = config.parallel_config.tensor_parallel_size
            config.additional_config = replace(plan, ranks=ranks)
        with hearing_why():
            return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"vLLM did not start: {reason}") from error


def _keep_sockets_together() -> None:
    """vLLM leaves seven sockets in the folder for temporary files each time that it starts."""
    if "VLLM_RPC_BASE_PATH" not in os.environ:
        folder = os.environ["VLLM_RPC_BASE_PATH"] = tempfile.mkdtemp(prefix="hn-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
