"""Reasoning beside content: both tinted, one of them judged. The fake engine repeats the markup."""

from __future__ import annotations

import json

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.answers import ChatCompletion
from server.engines.fake import FakeEngine
from server.plain_parsers import plain_parsers
from tests.answers import both_ways
from tests.contract.test_invariants import REQUESTS

WORDS = ["<think>", "</think>", "</thi", "<", "in", "1969", "né", "😀", "7", "", "[nan:3]"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)


@pytest.fixture
def open_thinking(open_wire):
    """A server of a model that reasons."""

    def make(**settings):
        engine = FakeEngine()
        parsers = plain_parsers(engine.tokenizer, reasoning="deepseek_r1", tool_call=None)
        return open_wire(engine, parsers=parsers, **settings)

    return make


@settings(max_examples=80)
@given(text=TEXTS, fields=REQUESTS)
async def test_streamed_equals_not_streamed_in_every_field(open_wire, text, fields):
    """I1, I2, I10 with a parser in between, under every policy, seed and stop string."""
    engine = FakeEngine()
    parsers = plain_parsers(engine.tokenizer, reasoning="deepseek_r1", tool_call=None)
    async with open_wire(engine, parsers=parsers) as wire:
        await both_ways(wire, text, **fields)


async def test_reasoning_is_tinted_and_only_the_answer_is_judged(open_thinking):
    """A guess that the model takes back while it reasons is no fault of its answer."""
    async with open_thinking() as wire:
        body = (await wire.chat("<think>in 1969?</think>no", risk=True)).json()
        wrong = (await wire.chat("<think>no?</think>in 1969", risk=True)).json()
    ChatCompletion.model_validate(body)
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "no",
        "refusal": None,
        "reasoning": "in 1969?",
    }
    (span,) = choice["risk"]["spans"]
    assert (span["segment"], span["start"], span["end"], span["text"]) == (
        "reasoning",
        3,
        7,
        "1969",
    )
    assert (choice["risk"]["status"], choice["risk"]["flagged"]) == ("scored", False)
    risk = wrong["choices"][0]["risk"]
    assert (risk["flagged"], risk["spans"][0]["segment"], risk["spans"][0]["start"]) == (
        *(True, "content"),
        3,
    )


async def test_an_answer_of_reasoning_alone_is_not_judged(open_thinking):
    """Cut by its length before it came to the point: nothing is known of an answer."""
    async with open_thinking() as wire:
        choice = (await wire.chat("<think>1969", risk=True, max_tokens=10)).json()["choices"][0]
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning"] == "196"
    assert choice["finish_reason"] == "length"
    risk = choice["risk"]
    assert (risk["status"], risk["reason"], risk["score"]) == ("unavailable", "no_text", None)
    assert [token["token"] for token in risk["tokens"][-3:]] == ["1", "9", "6"]


async def test_the_policies_look_at_the_answer(open_thinking):
    """stop, withhold and retry act on what the user gets to read as an answer."""
    async with open_thinking() as wire:
        for policy in ("stop", "withhold", "retry"):
            calm = await wire.chat("<think>1969</think>no", risk={"policy": policy})
            assert calm.json()["choices"][0]["message"]["content"] == "no"
        stopped = await wire.chat("<think>1969</think>no 7 x", risk={"policy": "stop"})
        assert stopped.json()["choices"][0]["message"]["content"] == "no 7"
        withheld = await wire.chat("<think>why</think>in 1969", risk={"policy": "withhold"})
        assert withheld.json()["choices"][0]["finish_reason"] == "content_filter"
        assert "why" not in withheld.text


async def test_an_answer_with_reasoning_can_be_sent_back(open_thinking):
    """Templates of reasoning models decide what becomes of it; content may be null."""
    async with open_thinking() as wire:
        wire.engine.tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content }}|{{ m.content }};"
            "{% endfor %}"
        )
        turns = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "refusal": None, "reasoning": "b"},
            {"role": "user", "content": "c"},
        ]
        answer = (await wire.chat("", messages=turns, return_token_ids=True)).json()
    prompt = bytes(answer["prompt_token_ids"]).decode()
    assert prompt == "user:|a;assistant:b|;user:|c;"


@pytest.mark.parametrize(
    "message",
    [{"role": "user", "content": None}, {"role": "user", "content": "a", "reasoning": "b"}],
    ids=json.dumps,
)
async def test_only_answers_have_reasoning_and_no_content(wire, message):
    """A user's turn without text is a mistake of the client."""
    response = await wire.chat("", messages=[message])
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("messages.0.")


async def test_the_official_client_keeps_reasoning_streamed_and_whole(open_thinking):
    """It passes unknown fields of message and delta on."""
    ask = {"model": "fake", "messages": [{"role": "user", "content": "<think>a</think>b"}]}
    async with open_thinking() as wire:
        client = openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="none", http_client=wire.http, max_retries=0
        )
        message = (await client.chat.completions.create(**ask)).choices[0].message
        assert (message.reasoning, message.content) == ("a", "b")
        reasoning = content = ""
        async for chunk in await client.chat.completions.create(**ask, stream=True):
            delta = chunk.choices[0].delta
            reasoning += getattr(delta, "reasoning", None) or ""
            content += delta.content or ""
    assert (reasoning, content) == ("a", "b")
