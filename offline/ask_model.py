"""Ask a language model about answers: is this one right, and which of its words make the claim?

Any server that speaks OpenAI's chat completions with `response_format` will do. The reply must be
exactly one JSON object of the asked form. One that is not is counted as such and never read as a
verdict: the reference code took "incorrect" for "correct". Replies are kept word for word
(replies.py); a run that was killed asks only what is missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from tqdm import tqdm

from offline.chat_client import at_most, connect
from offline.judge import ABSTAINED, Case, Judgement
from offline.records import Header, Reply, Verdict
from offline.replies import Replies, digest, reply
from offline.words import new_words, occurrences, words

UNREADABLE = "the judge's reply is no verdict"

_JUDGE = """You grade an answer to a question against the accepted answers.
Reply with one JSON object {"verdict": V} and nothing else. V is
"correct" if the answer commits itself to something that means the same as an accepted answer,
"incorrect" if it says something else, names several alternatives, or evades the question,
"abstained" if it is empty, refuses, or says that it does not know.
Do not judge style. Do not use knowledge of your own beyond what spellings and names mean."""

_CLAIM = """You find the words of an answer that make its claim: the shortest contiguous words that
answer the question, without the words around them.
Reply with one JSON object {"claim": C} and nothing else. C is copied from the answer character by
character, or "" if the answer claims nothing. Whether the claim is true does not matter."""


class _VerdictReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    verdict: Literal["correct", "incorrect", "abstained"]


class _ClaimReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    claim: str


_VERDICTS: dict[str, Verdict] = {
    "correct": "right",
    "incorrect": "wrong",
    "abstained": "abstained",
}


class Asked(NamedTuple):
    """The model that is asked, and where its replies are kept."""

    base_url: str
    model: str  # as the server names it
    folder: Path
    header: Header  # of the answers
    in_flight: int
    api_key: str | None = None


class LanguageModelJudge:
    """A judge behind an OpenAI-compatible address."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self.name = f"language model {asked.model}, prompt {digest(_JUDGE)[:8]}"

    def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        prompts = [
            _fields(question=case.question, accepted=list(case.gold), answer=case.text)
            for case in cases
        ]
        replies = _ask_all(self._asked, "judge", _JUDGE, _VerdictReply, prompts)
        return [parse_verdict(said) for said in replies]


def claims(asked: Asked, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int] | None]:
    """For each (question, answer) the characters of the claim; None where the model named none."""
    prompts = [_fields(question=question, answer=text) for question, text in pairs]
    replies = _ask_all(asked, "claims", _CLAIM, _ClaimReply, prompts)
    return [
        parse_claim(said, question, text)
        for said, (question, text) in zip(replies, pairs, strict=True)
    ]


def parse_verdict(said: str) -> Judgement:
    """`unjudged` unless the whole reply is one object with one of the three verdicts."""
    try:
        verdict = msgspec.json.decode(said, type=_VerdictReply).verdict
    except (msgspec.DecodeError, UnicodeError):
        return Judgement("unjudged", UNREADABLE)
    return Judgement(_VERDICTS[verdict], ABSTAINED if verdict == "abstained" else "")


def parse_claim(said: str, question: str, text: str) -> tuple[int, int] | None:
    """Characters of the claim in `text`. The words are looked for as they stand, whole; where they
    stand several times, the place counts where they say what the question did not."""
    try:
        claim = msgspec.json.decode(said, type=_ClaimReply).claim
    except (msgspec.DecodeError, UnicodeError):
        return None
    found, wanted = words(text), [word.key for word in words(claim)]
    if not wanted:
        return None
    places = list(occurrences([word.key for word in found], wanted))
    if not places:
        return None
    new = {word.start for word in new_words(found, question)}
    at = max(
        places,
        key=lambda i: (sum(word.start in new for word in found[i : i + len(wanted)]), -i),
    )
    return found[at].start, found[at + len(wanted) - 1].stop


def _fields(**fields: object) -> str:
    """The question to the model as JSON: an answer that holds instructions stays a string."""
    return msgspec.json.encode(fields).decode()


def _ask_all(
    asked: Asked, what: str, instruction: str, form: type, prompts: Sequence[str]
) -> list[str]:
    """The reply to each prompt, from the file of replies or from the server."""
    kept = Replies(
        asked.folder, what, asked.header, model=asked.model, instruction=digest(instruction)
    )
    if missing := kept.missing(prompts):
        asyncio.run(_ask_missing(asked, kept, instruction, form, missing))
    return kept.of(prompts)


async def _ask_missing(
    asked: Asked, kept: Replies, instruction: str, form: type, missing: Sequence[str]
) -> None:
    schema = {"name": form.__name__.strip("_"), "strict": True, "schema": _schema(form)}
    async with connect(
        asked.base_url, in_flight=asked.in_flight, api_key=asked.api_key, model=asked.model
    ) as client:

        async def ask(prompt: str) -> Reply:
            body: dict[str, object] = {
                "messages": [
                    {"role": "system", "content": instruction},
                    {"role": "user", "content": prompt},
                ],
                "temperature": 0.0,
                "max_completion_tokens": 512,
                "response_format": {"type": "json_schema", "json_schema": schema},
            }
            completion = await client.complete(body, name=f"{kept.path.stem}, {prompt[:80]!r}")
            return reply(prompt, completion.text or "")

        with kept.appender() as out, tqdm(total=len(missing), desc=kept.path.stem) as bar:
            async for said in at_most(asked.in_flight, missing, ask):
                out.append(said)
                bar.update()


def _schema(form: type) -> dict[str, object]:
    """JSON schema of a reply, without the references that some servers do not follow."""
    _, components = msgspec.json.schema_components([form])
    return dict(components[form.__name__])
