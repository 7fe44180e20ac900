"""The shipped probe on the demo model, as a user meets it: over HTTP, at the default threshold, on
either engine.

Reads question files from beside the repository (`shared_data`; they are not part of the product).
Nothing here was fitted or calibrated on: the ordinary prompts are those of the split `test`, the
questions are of relations that the card names as unseen.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from offline.answer_spans import CharSpan, locate_right, locate_wrong
from offline.judge import Case, by_alias, usable_aliases
from offline.questions import Question, Source, read_questions
from probes.probe import Probe
from tests.running import RunningServer

PER_RELATION = 12
QUESTIONS = 120
LONG_ANSWERS = 30
LONG_TOKENS = 100


class Scored(NamedTuple):
    """One answer of the served model."""

    question: Question
    text: str
    risk: dict[str, Any]

    def tokens(self, spans: tuple[CharSpan, ...] | None = None) -> list[float]:
        """Risks of all scored tokens, or of those that share a character with `spans`."""
        return [
            token["risk"]
            for token in self.risk["tokens"]
            if token["risk"] is not None
            and (spans is None or any(token["start"] < b and a < token["end"] for a, b in spans))
        ]


@pytest.fixture(scope="module")
def probe_path(repository: Path) -> Path:
    return repository / "probes" / "fitted" / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def long_answers(server: RunningServer, repository: Path) -> list[Scored]:
    path = repository / "offline" / "data" / "ordinary_prompts.jsonl"
    prompts = [q for q in read_questions(Source.parse(f"{path}:ordinary")) if q.split == "test"]
    assert len(prompts) > 200
    return asyncio.run(_ask(server.address, prompts[:LONG_ANSWERS], LONG_TOKENS))


@pytest.fixture(scope="module")
def short_answers(server: RunningServer, shared_data: Path, probe_path: Path) -> list[Scored]:
    unseen = Probe.load(probe_path).card.training["relations of the test part"].split("; ")
    path = shared_data / "wikidata_completions.jsonl"
    questions = [
        question
        for question in read_questions(Source.parse(f"{path}:complete:{PER_RELATION}"))
        if f"{question.source}/{question.group}" in unseen
    ][:QUESTIONS]
    assert len(questions) > 60
    return asyncio.run(_ask(server.address, questions, 24))


@pytest.fixture(scope="module")
def claims(short_answers: list[Scored]) -> dict[str, list[list[float]]]:
    """Verdict -> risks of the claim's tokens, one list per answer."""
    found: dict[str, list[list[float]]] = {"right": [], "wrong": []}
    for answer in short_answers:
        question, gold = answer.question.question, answer.question.gold
        verdict = by_alias(Case(answer.question.id, question, gold, answer.text)).verdict
        if verdict == "right":
            located = locate_right(answer.text, usable_aliases(gold, question))
        elif verdict == "wrong":
            located = locate_wrong(answer.text, question, gold)
        else:
            continue
        if located is not None:
            found[verdict].append(answer.tokens(located.spans))
    return found


def test_ordinary_long_answers_stay_untinted(long_answers: list[Scored]) -> None:
    """A probe fitted on answer means lights up 79 % of prose at half recall: unusable on a page."""
    threshold = long_answers[0].risk["token_threshold"]
    risks = [risk for answer in long_answers for risk in answer.tokens()]
    assert len(risks) > 1000
    assert sum(risk >= threshold for risk in risks) / len(risks) <= 0.02


def test_half_of_the_tokens_of_wrong_claims_are_flagged(
    short_answers: list[Scored], claims: dict[str, list[list[float]]]
) -> None:
    """At the same threshold as above, on relations that the probe never saw."""
    threshold = short_answers[0].risk["token_threshold"]
    risks = [risk for claim in claims["wrong"] for risk in claim]
    assert len(claims["wrong"]) >= 30
    assert sum(risk >= threshold for risk in risks) / len(risks) >= 0.5


def test_a_wrong_claim_has_on_average_a_higher_risk_than_a_right_one(
    claims: dict[str, list[list[float]]],
) -> None:
    """Trap 20: polarity, from the question file to the wire."""
    mean = {
        verdict: sum(sum(claim) / len(claim) for claim in found) / len(found)
        for verdict, found in claims.items()
    }
    assert len(claims["right"]) >= 8
    assert mean["wrong"] > mean["right"] + 0.1


async def _ask(url: str, questions: list[Question], max_tokens: int) -> list[Scored]:
    """Greedy answers with risk, all in flight at once as the server's queue allows."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        gate = asyncio.Semaphore(32)

        async def one(question: Question) -> Scored:
            async with gate:
                response = await client.post(
                    "/v1/chat/completions",
                    json={
                        "model": model,
                        "messages": [{"role": "user", "content": question.prompt}],
                        "max_tokens": max_tokens,
                        "temperature": 0,
                        "risk": True,
                    },
                )
            response.raise_for_status()
            choice = response.json()["choices"][0]
            assert choice["risk"]["status"] == "scored"
            return Scored(question, choice["message"]["content"], choice["risk"])

        return list(await asyncio.gather(*map(one, questions)))
