"""What the drift index gives for known changes of the traffic, through whole servers.

    python benchmarks/drift.py [--data ../shared/data] [--answers 240]

Each row is traffic: questions are asked of a server of the demo model with its shipped probe, and
the index is made of the counters on its metrics page as deploy/prometheus/recording.rules.yml does
it. Half of the tokens are of short factual answers, half of ordinary long ones: the mixture that
the card's reference is of. Two changes are refused at start and cannot happen: another chat
template of the model, and another dtype. For the dtype the probe is bound by hand to what it is
not of, to show what the refusal spares; a template changes when a client brings its own prompt.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import numpy as np
import typer
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

import offline
from offline.child_server import child_server
from offline.models import load_model, load_tokenizer
from offline.publish import with_known_answers
from offline.questions import Question, Source, read_questions, shuffle_key
from probes.errors import ProbeMismatchError
from probes.fingerprint import match
from probes.neurons import find_ffns
from probes.probe import Probe
from server.demo_model import ensure_demo_model
from server.startup import DEMO, DEMO_PROBE, SHIPPED_PROBES

# As the Makefile's QUESTIONS; the last number is how many rows of a group belong to another style.
TRAINED = (
    "wikidata_completions.jsonl:complete:200",
    "wikidata_completions.jsonl:ask:30:200",
    "triviaqa_train.jsonl:answer_only:1000",
    "triviaqa_train.jsonl:ask:300:1000",
)
DOMAINS = ("nq_open_dev.jsonl:answer_only:600", "movies.jsonl:ask:400")
ORDINARY = Path(offline.__file__).parent / "data" / "ordinary_prompts.jsonl"
ORDINARY_TOKENS = 120  # of each ordinary answer
IN_FLIGHT = 16
FLOOR = 1e-4  # of a share, as in the rule

Counts = NDArray[np.float64]  # [bins] tokens
Body = tuple[str, dict[str, Any]]  # path and request
Ask = Callable[[Question], Body]


def chat(question: Question) -> Body:
    return "chat/completions", {"messages": [{"role": "user", "content": question.prompt}]}


def own_system_message(question: Question) -> Body:
    system = {"role": "system", "content": "You are the help desk of a city library. Be brief."}
    path, body = chat(question)
    return path, {"messages": [system, *body["messages"]]}


def no_system_turn(question: Question) -> Body:
    turn = f"<|im_start|>user\n{question.prompt}<|im_end|>\n<|im_start|>assistant\n"
    return "completions", {"prompt": turn}


def no_template(question: Question) -> Body:
    return "completions", {"prompt": f"Question: {question.prompt}\nAnswer:"}


class Served:
    """A server, and what its counters say of traffic."""

    def __init__(self, url: str, prose: Sequence[Question]) -> None:
        self._http = httpx.Client(base_url=url, timeout=600)
        self._prose = prose
        self._prose_tokens: dict[Ask, Counts] = {}

    def mixture(self, questions: Sequence[Question], ask: Ask = chat) -> tuple[Counts, int]:
        """Shares of short answers and ordinary ones, weighed alike; how many tokens were read."""
        short, prose = self._tokens(questions, ask), self.prose(ask)
        return short / short.sum() + prose / prose.sum(), int(short.sum() + prose.sum())

    def prose(self, ask: Ask = chat) -> Counts:
        if ask not in self._prose_tokens:
            self._prose_tokens[ask] = self._tokens(self._prose, ask)
        return self._prose_tokens[ask]

    def _tokens(self, questions: Sequence[Question], ask: Ask) -> Counts:
        """Ask them all; the calibrated tokens that this added to each bin."""

        def answer(question: Question) -> None:
            path, body = ask(question)
            common = {"model": DEMO, "temperature": 0, "risk": True}
            limit = {"max_tokens": min(question.max_tokens, ORDINARY_TOKENS)}
            self._http.post(f"/v1/{path}", json=body | common | limit).raise_for_status()

        before = self._bins()
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            list(pool.map(answer, questions))
        return self._bins() - before

    def _bins(self) -> Counts:
        page = self._http.get("/metrics").text
        return np.array(
            [
                sample.value
                for family in text_string_to_metric_families(page)
                for sample in family.samples
                if sample.name == "hneurons_binned_tokens_total"
            ]
        )


def index(probe: Probe, counts: Counts) -> float:
    """The population-stability index, as the recording rule computes it."""
    shares = np.maximum(counts / counts.sum(), FLOOR)
    reference = np.array(probe.card.token.reference.shares)
    return math.fsum((shares - reference) * np.log(shares / reference))


def bound_to(probe: Probe, model: Path, dtype: str) -> Probe:
    """The probe as if it were of the model in another dtype; prints what refuses it as it is."""
    tokenizer = load_tokenizer(str(model), revision=None)
    loaded = load_model(str(model), revision=None, tokenizer=tokenizer, dtype=dtype)
    try:
        match(probe, loaded.identity)
    except ProbeMismatchError as refusal:
        print(f"refused at start: {refusal}", flush=True)
    else:
        raise SystemExit(f"a probe of {probe.card.model.dtype} was taken for one of {dtype}")
    card = msgspec.structs.replace(probe.card, model=loaded.identity)
    sequences = [answer.token_ids for answer in card.known_answers]
    other = dataclasses.replace(probe, card=card)
    return with_known_answers(other, loaded.model, find_ffns(loaded.model), sequences)


def some(data: Path, sources: Sequence[str], count: int) -> list[Question]:
    """`count` of their questions, mixed; always the same ones."""
    questions = [q for s in sources for q in read_questions(Source.parse(f"{data / s}"))]
    return sorted(questions, key=lambda q: shuffle_key(q.id))[:count]


def main(
    data: Annotated[Path, typer.Option(help="folder of the question files")] = Path(
        "../shared/data"
    ),
    answers: Annotated[int, typer.Option(min=20, help="short answers per row")] = 240,
) -> None:
    model, folder = ensure_demo_model(), SHIPPED_PROBES / DEMO_PROBE
    probe = Probe.load(folder)
    prose = some(ORDINARY.parent, [f"{ORDINARY.name}:ordinary"], answers // 10)
    same = some(data, TRAINED, answers)

    def row(name: str, counts: Counts, tokens: int) -> None:
        print(f"| {name} | {tokens} | {index(probe, counts):.3f} |", flush=True)

    print("| traffic | tokens | index |\n|---|---|---|", flush=True)
    with child_server(DEMO, in_flight=IN_FLIGHT, probes=[str(folder)]) as url:
        served = Served(url, prose)
        row("the same questions", *served.mixture(same))
        row("a system message of the application's own", *served.mixture(same, own_system_message))
        row("the template without its system turn", *served.mixture(same, no_system_turn))
        row("no chat template at all", *served.mixture(same, no_template))
        for source in DOMAINS:
            name = f"another domain: {Path(source).stem}"
            row(name, *served.mixture(some(data, [source], answers)))
        row("ordinary prose alone", served.prose(), int(served.prose().sum()))
    other = bound_to(probe, model, "float32")
    with tempfile.TemporaryDirectory() as scratch:
        other.save(Path(scratch) / DEMO_PROBE)
        probes = [f"{scratch}/{DEMO_PROBE}"]
        with child_server(DEMO, in_flight=IN_FLIGHT, probes=probes, dtype="float32") as url:
            row("the model in float32", *Served(url, prose).mixture(same))


if __name__ == "__main__":
    typer.run(main)
