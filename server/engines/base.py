"""The seam: what every engine gives and takes. Above it nothing knows which engine runs.

An engine takes token ids and gives token ids; text, stop strings, offsets, risk and the wire are
made above the seam. A token is *written* when it is sampled and *read* when it is fed to the next
forward pass, one step later. A `Step` therefore carries the token that a pass wrote and the reading
of the token that the same pass was fed, and every reading names its position.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

from probes.errors import HNeuronsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from probes.card import ModelIdentity
    from probes.probe import Probe
    from server.parsing import Parsers


class EngineError(HNeuronsError):
    """Base of what an engine raises."""


class EngineOverloadedError(EngineError):
    """The waiting queue is full; nothing was started. HTTP 429 with Retry-After."""


class EngineDeadError(EngineError):
    """The engine cannot go on. HTTP 503, `/readyz` fails, the process exits non-zero."""


class RequestFailedError(EngineError):
    """This one request cannot go on (non-finite model logits, slow client, ...).

    `code` is a short stable word for logs, metrics and the error event, e.g. `nonfinite_logits`.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


FinishReason = Literal["stop", "length"]


class Contribution(NamedTuple):
    """Share of one neuron in a logit: `weight * cett`. Shows what was added, not what caused it."""

    layer: int
    neuron: int
    value: float


class Reading(NamedTuple):
    """What the meter saw in the pass that was fed the token at `position`.

    position       absolute index of the token that was read (prompt included, 0-based)
    logits         one per head of the request's probe, additive, higher is worse; may be
                   non-finite: the monitor, not the engine, turns that into "not scored"
    contributions  largest absolute contributions to the token head, only when asked for
    """

    position: int
    logits: tuple[float, ...]
    contributions: tuple[Contribution, ...] = ()


class TokenLogprobs(NamedTuple):
    """Log-probabilities (natural log) of one written token, before temperature and penalties."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), best first


class Step(NamedTuple):
    """One forward pass of one request.

    token_id       the token that was written; None in the hidden extra step, which only reads
    reading        of the token that this pass was fed: the *previous* token (in the first step the
                   last prompt token); None when no probe was asked for
    logprobs       of `token_id`, when asked for
    finish_reason  set on the last step and only there
    """

    token_id: int | None
    reading: Reading | None = None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None


class Grammar(NamedTuple):
    """What the written text is held to, token by token.

    json            `text` is a JSON Schema: the whole answer is JSON of it
    structural_tag  `text` is XGrammar's description of free text with tagged JSON in it
    """

    kind: Literal["json", "structural_tag"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Defaults are neutral; the wire's defaults are made above."""

    temperature: float = 1.0  # below 1e-5 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    seed: int | None = None  # None: fresh entropy
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # None: no logprobs; k: the written token and the k best
    ignore_eos: bool = False  # for load tests
    grammar: Grammar | None = None  # only a GuidedEngine can be held to one


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One choice to generate; `n` choices are `n` requests with seeds `seed + i`."""

    request_id: str
    prompt_token_ids: tuple[int, ...]  # at least one
    max_tokens: int  # >= 1; prompt + max_tokens <= card.max_model_len is checked above
    sampling: Sampling = field(default_factory=Sampling)
    probe: str | None = None  # id or name of the probe that reads; None: nothing is read
    read_last: bool = False  # one hidden extra step at a length finish, for `read` probes
    alpha: float = 1.0  # 1 is off; scales the suppression set of `probe`
    contributors: int = 0  # how many contributions each reading carries
    tenant: int = 0  # keys and values of prompts are shared within one; 0: no API keys


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """Given token ids, read without generating anything."""

    request_id: str
    token_ids: tuple[int, ...]
    start: int  # readings are wanted for positions [start - 1, len(token_ids))
    probe: str
    alpha: float = 1.0
    contributors: int = 0
    tenant: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineCard:
    """What the engine serves; constant while it lives."""

    engine: str  # "fake" | "transformers" | "vllm"
    model_id: str  # as the operator gave it
    max_model_len: int  # tokens, prompt and answer together
    vocab_size: int  # legal token ids are [0, vocab_size)
    eos_token_ids: frozenset[int]
    dtype: str
    identity: ModelIdentity  # what a probe is matched against
    # Fields of `Sampling` that this engine cannot honour as it was started, and why.
    refused_sampling: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Health:
    """A cheap look, taken by `/readyz` and `/metrics`; never blocks."""

    alive: bool
    reason: str = ""  # why not alive
    running: int = 0  # requests that are decoding
    waiting: int = 0  # requests in the queue
    waiting_tokens: int = 0  # prompt tokens in the queue
    seconds_since_step: float = 0.0  # 0 while idle
    meter_seconds_total: float | None = None  # wall time in the meter; None: it has no clock
    forward_seconds_total: float = 0.0  # wall time spent in forward passes, meter included
    cached_tokens_total: int = 0  # prompt tokens whose keys and values were there already
    # None: this engine has no blocks of keys and values to share out, and drafts nothing.
    cache_usage: float | None = None  # share of the blocks that running requests hold
    preemptions_total: int | None = None  # requests that gave their blocks up and begin again
    draft_tokens_total: int | None = None  # tokens that were guessed
    accepted_draft_tokens_total: int | None = None  # of these, the ones that stand


class Engine(Protocol):
    """A language model that can be read. All methods are called on the event loop."""

    @property
    def card(self) -> EngineCard: ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def probes(self) -> Sequence[Probe]:
        """The probes that are attached; matched to the model when the engine was made."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Step, None]:
        """Steps of one request. Closing the iterator aborts it within a step.

        Raises EngineOverloadedError before the first step when the queue is full,
        RequestFailedError when only this request fails, EngineDeadError when the engine is gone.
        """
        ...

    async def score(self, request: ScoreRequest) -> tuple[Reading, ...]:
        """Readings of positions `max(start - 1, 0) .. len(token_ids) - 1`, in order."""
        ...

    def health(self) -> Health: ...

    async def aclose(self) -> None:
        """End every request with EngineDeadError and free the model."""
        ...


@runtime_checkable
class ReloadingEngine(Engine, Protocol):
    """An engine whose probes can be changed while it runs."""

    async def attach(self, probes: Sequence[Probe]) -> None:
        """Read these as well, by id, from the next step on; `probes` stays what it was.

        ProbeError when they cannot be read here; nothing has changed then.
        """
        ...

    def offer(self, probes: Sequence[Probe]) -> None:
        """`probes` are these from now on; all are attached, the others can still be named by id."""
        ...

    async def detach(self) -> None:
        """Read only what is offered; no open request names another probe."""
        ...


@runtime_checkable
class GuidedEngine(Engine, Protocol):
    """An engine that can be held to a grammar: it obeys `Sampling.grammar`."""

    def check_grammar(self, grammar: Grammar) -> None:
        """ValueError, with the reason, when the engine cannot be held to this.

        Takes no engine time, but milliseconds of computation; may be called on any thread.
        """
        ...


@runtime_checkable
class ParsingEngine(Engine, Protocol):
    """An engine that comes with parsers of its own."""

    @property
    def parsers(self) -> Parsers | None:
        """Those that it was made with."""
        ...


def probe_index(probes: Sequence[Probe], word: str) -> int:
    """Of the probe with that id, else of the first with that name; ValueError when there is none.

    Two probes may share a name while one takes the other's place.
    """
    for known in ([probe.id for probe in probes], [probe.card.name for probe in probes]):
        if word in known:
            return known.index(word)
    raise ValueError(f"no probe {word!r} is attached; there are {[p.id for p in probes]}")
