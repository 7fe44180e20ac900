"""What a request handler needs, in one frozen object at `app.state.service`: plain values only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version

from probes.probe import Probe
from server.answer_record import AnswerRecord, Recorder
from server.detokenizer import TokenNames
from server.engines.base import Engine
from server.metrics import Metrics
from server.parsing import Parsers


@dataclass(frozen=True, kw_only=True)
class Service:
    """One engine and how it is offered."""

    engine: Engine
    metrics: Metrics
    served_names: tuple[str, ...]  # the model's names on the wire; the first is echoed
    created: int  # Unix seconds, when the model was loaded
    suppression: bool = True  # requests may set alpha
    risk_by_default: bool = False  # a request without `risk` gets it
    parsers: Parsers | None = None  # of chats: what of an answer is reasoning or a tool call
    default_max_tokens: int = 1024  # when a request sets none; never more than the context holds
    max_total_tokens: int = 65_536  # n * max_tokens of one request
    room_for_choices: int | None = None  # of one request: what the engine's batch and queue hold
    room_for_prompt_tokens: int | None = (
        None  # of one request with several choices: what the queue holds
    )
    keep_alive_seconds: float = 15.0  # a stream that was silent so long sends a comment
    clock: Callable[[], float] = time.monotonic
    recorders: tuple[Recorder, ...] = ()  # told of every answer that is over
    keeps_text: bool = False  # records carry the text that went out

    @property
    def model_name(self) -> str:
        """The name that responses carry and metrics are labelled with."""
        return self.served_names[0]

    @property
    def default_probe(self) -> str | None:
        """Name of the probe of `"risk": true`; None: the server has none."""
        probes = self.engine.probes
        return probes[0].card.name if probes else None

    @cached_property
    def system_fingerprint(self) -> str:
        """Changes with the server's version and with the model's weights."""
        weights = self.engine.card.identity.weights_fingerprint
        return f"hneurons-{version('hneurons')}-{weights[:12]}"

    @cached_property
    def token_names(self) -> TokenNames:
        """How tokens are called in log-probabilities."""
        return TokenNames(self.engine.tokenizer)

    def record(self, answer: AnswerRecord) -> None:
        """Tell the audit log and the traces, where there are any."""
        for recorder in self.recorders:
            recorder.record(answer)

    def probe(self, name: str) -> Probe | None:
        """The loaded probe of that name, or of that `name@sha`."""
        for probe in self.engine.probes:
            if name in (probe.card.name, probe.id):
                return probe
        return None
