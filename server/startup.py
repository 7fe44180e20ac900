"""From what the operator asked for to an engine: which model, which probes, which keys.

Everything here refuses with one sentence before the listener exists.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import probes
from probes.errors import ModelError
from probes.probe import Probe
from server.answer_record import Recorder
from server.audit import AuditLog
from server.auth import hash_keys, read_key_hashes
from server.engines.base import Engine, ParsingEngine
from server.hub import fetch_probe, is_pinned
from server.metrics import Metrics
from server.parsing import Parsers
from server.plain_parsers import plain_parsers
from server.service import Service
from server.settings import BadSettingsError, Secrets, Settings

DEMO = "demo"
DEMO_PROBE = "smollm2-135m-instruct"
SHIPPED_PROBES = Path(probes.__file__).parent / "fitted"


@dataclass(frozen=True)
class Model:
    """Where the weights are and what the model is called on the wire, first name first."""

    source: Path | str  # a folder, or a hub id
    names: tuple[str, ...]


def find_model(settings: Settings) -> Model:
    """The model that MODEL means; makes the demo model when it is asked for."""
    word, chosen = settings.model, settings.served_model_name
    if settings.engine == "fake":
        return Model(word, (chosen or word,))
    if word == DEMO:
        from server.demo_model import ensure_demo_model

        folder = ensure_demo_model()
        return Model(folder, (chosen,) if chosen else (folder.name, DEMO))
    folder = Path(word).expanduser()
    if folder.is_dir():
        return Model(folder, (chosen or folder.resolve().name,))
    looks_like_hub_id = word.count("/") <= 1 and word[0] not in "/.~"
    if folder.exists() or not looks_like_hub_id:
        raise BadSettingsError(
            f"MODEL: {word!r} is not a folder; give a folder with config.json and safetensors, "
            "a hub id such as `org/name`, or `demo`"
        )
    return Model(word, (chosen or word,))


def find_probes(settings: Settings) -> tuple[Path, ...]:
    """Folders of the probes to load, the default one first."""
    if settings.probe == ("none",):
        return ()
    if settings.probe:
        return tuple(_probe_path(word) for word in settings.probe)
    shipped = SHIPPED_PROBES / DEMO_PROBE
    is_demo = settings.model == DEMO and settings.engine != "fake"
    return (shipped,) if is_demo and shipped.is_dir() else ()


def find_key_hashes(settings: Settings) -> tuple[bytes, ...]:
    """Digests of all API keys; none means an open server."""
    from_environment = Secrets().api_keys
    hashes: tuple[bytes, ...] = ()
    if from_environment is not None:
        hashes += hash_keys(from_environment.get_secret_value())
    if settings.api_key_file is not None:
        hashes += read_key_hashes(settings.api_key_file)
    return hashes


def load_engine(settings: Settings, model: Model, probes: Sequence[Probe]) -> Engine:
    """Load the weights, or none; blocks until the engine can work."""
    if settings.engine == "fake":
        from server.engines.fake import FakeEngine

        return FakeEngine(
            probes=probes if settings.probe else None,
            max_model_len=settings.max_model_len or 4096,
            max_num_seqs=settings.max_num_seqs,
            max_waiting_requests=settings.max_waiting_requests,
            max_waiting_tokens=settings.max_waiting_tokens,
        )
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging as transformers_logging

    # stderr is for JSON lines and one last sentence.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        return _load_checkpoint(settings, model, probes)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        # What libraries raise for a damaged checkpoint, an unknown device, too little memory.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(f"cannot load {settings.model!r}: {reason}") from error


def _load_checkpoint(settings: Settings, model: Model, probes: Sequence[Probe]) -> Engine:
    common: dict[str, Any] = {
        "model_id": settings.model,
        "revision": settings.revision,
        "probes": probes,
        "dtype": None if settings.dtype == "auto" else settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_waiting_requests": settings.max_waiting_requests,
        "max_waiting_tokens": settings.max_waiting_tokens,
        "suppression": settings.allows_alpha,
    }
    if settings.engine == "vllm":
        from server.engines.vllm.loader import load_vllm_engine

        return load_vllm_engine(
            model.source,
            reasoning_parser=settings.reasoning_parser,
            tool_call_parser=settings.tool_call_parser,
            vllm_args=settings.vllm_args,
            **common,
        )
    from server.engines.loader import load_transformers_engine

    device = None if settings.device == "auto" else settings.device
    return load_transformers_engine(
        model.source, device=device, prefix_tokens=settings.prefix_cache_tokens, **common
    )


def make_service(settings: Settings, engine: Engine, model: Model) -> Service:
    """What the handlers get: plain values, no settings."""
    if settings.risk_by_default and not engine.probes:
        raise BadSettingsError("risk_by_default: the server has no probe; add --probe")
    metrics = Metrics(model_name=model.names[0], health=engine.health)
    metrics.show_probes(engine.probes)
    return Service(
        engine=engine,
        metrics=metrics,
        served_names=model.names,
        created=int(time.time()),
        suppression=settings.allows_alpha,
        risk_by_default=settings.risk_by_default,
        parsers=find_parsers(settings, engine),
        room_for_choices=settings.max_num_seqs + settings.max_waiting_requests,
        room_for_prompt_tokens=settings.max_waiting_tokens,
        recorders=tuple(_recorders(settings, metrics)),
        keeps_text=settings.audit_text,
    )


def find_parsers(settings: Settings, engine: Engine) -> Parsers | None:
    """The engine's own, else a plain one; None when no parser was named."""
    reasoning, tool_call = settings.reasoning_parser, settings.tool_call_parser
    if reasoning is None and tool_call is None:
        return None
    if isinstance(engine, ParsingEngine):
        return engine.parsers
    return plain_parsers(engine.tokenizer, reasoning=reasoning, tool_call=tool_call)


def _recorders(settings: Settings, metrics: Metrics) -> Iterator[Recorder]:
    if settings.audit_log is not None:
        yield AuditLog(
            settings.audit_log,
            max_bytes=settings.audit_max_bytes,
            with_text=settings.audit_text,
            on_failure=metrics.audit_failed,
        )
    if settings.otlp_traces_endpoint is not None:
        from server.tracing import Tracing

        yield Tracing(settings.otlp_traces_endpoint)


def _probe_path(word: str) -> Path:
    """A word without a slash names a shipped probe, if there is one; else it is a path, or a hub id
    with its commit."""
    shipped = SHIPPED_PROBES / word
    if "/" not in word and shipped.is_dir():
        return shipped
    if is_pinned(word):
        return fetch_probe(word)
    path = Path(word).expanduser()
    if not path.exists():
        known = sorted(p.name for p in SHIPPED_PROBES.glob("*/")) if SHIPPED_PROBES.is_dir() else []
        names = ", ".join(known) or "there are none"
        raise BadSettingsError(
            f"probe: no folder {word!r}, no shipped probe of it ({names}) and no hub id with its "
            f"commit (org/name@40 hex digits)"
        )
    return path
