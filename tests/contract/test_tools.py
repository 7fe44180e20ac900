"""Tool calls over the wire. The fake engine repeats what it is asked, calls included."""

from __future__ import annotations

import json
from dataclasses import replace

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.answers import ChatCompletion
from server.engines.base import Grammar
from server.engines.fake import FakeEngine
from server.parsing import ToolUse
from server.plain_parsers import plain_parsers
from tests.answers import both_ways
from tests.contract.test_invariants import REQUESTS

FIND = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds a year.",
        "parameters": {"type": "object", "properties": {"year": {"type": "integer"}}},
    },
}
CALL = '<tool_call>{"name": "find", "arguments": {"year": %s}}</tool_call>'
WORDS = ["<tool_call>", CALL % 1969, CALL % 7, "</tool_call>", "in", "1969", "😀", "", "<think>"]
TEXTS = st.lists(st.sampled_from(["</think>", *WORDS]), max_size=6).map("".join)


def make_parsers(engine, *, reasoning=None):
    return plain_parsers(engine.tokenizer, reasoning=reasoning, tool_call="hermes")


@pytest.fixture
def open_calling(open_wire):
    """A server of a model that calls tools."""

    def make(engine=None, **settings):
        engine = engine or FakeEngine()
        return open_wire(engine, **{"parsers": make_parsers(engine), **settings})

    return make


@settings(max_examples=80)
@given(text=TEXTS, fields=REQUESTS, reasoning=st.sampled_from([None, "deepseek_r1"]))
async def test_streamed_equals_not_streamed_in_every_field(open_wire, text, fields, reasoning):
    """I1, I2, I10 with calls: every entry points into the arguments of its own call."""
    engine = FakeEngine()
    async with open_wire(engine, parsers=make_parsers(engine, reasoning=reasoning)) as wire:
        await both_ways(wire, text, tools=[FIND], **fields)


async def test_calls_come_as_openai_has_them(open_calling):
    """Content before them, one entry per call, arguments as text, a finish reason of their own."""
    async with open_calling() as wire:
        text = "Wait. " + CALL % 1969 + CALL % 7
        body = (await wire.chat(text, tools=[FIND], risk=True)).json()
    ChatCompletion.model_validate(body)
    (choice,) = body["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "Wait. "
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "find", "arguments": '{"year": 1969}'},
        {"name": "find", "arguments": '{"year": 7}'},
    ]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    risk = choice["risk"]
    assert [(s["segment"], s["tool_call_index"], s["start"], s["text"]) for s in risk["spans"]] == [
        ("tool_call", 0, 9, "1969"),
        ("tool_call", 1, 9, "7"),
    ]
    assert (risk["status"], risk["flagged"]) == ("scored", True)  # a wrong argument is an answer


async def test_calls_are_found_only_where_they_may_be_made(open_calling):
    """Without tools, or with `none`, the markup is what the model says."""
    async with open_calling() as wire:
        for fields in ({}, {"tools": [FIND], "tool_choice": "none"}, {"tool_choice": "none"}):
            choice = (await wire.chat(CALL % 7, **fields)).json()["choices"][0]
            assert choice["message"]["content"] == CALL % 7
            assert "tool_calls" not in choice["message"]
            assert choice["finish_reason"] == "stop"
        cut = (await wire.chat(CALL % 1969, tools=[FIND], max_tokens=52)).json()["choices"][0]
    assert cut["finish_reason"] == "length"
    assert cut["message"]["tool_calls"][0]["function"]["arguments"] == '{"year": 19'


async def test_tools_and_their_results_reach_the_prompt(open_calling):
    """In the model's own template; arguments are objects there, as templates expect."""
    engine = FakeEngine()
    engine.tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %};{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.year }}{% endfor %}{% endfor %}"
    )
    called = {"name": "find", "arguments": '{"year": 1969}'}
    turns = [
        {"role": "user", "content": "When?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": called}],
        },
        {"role": "tool", "content": "July", "tool_call_id": "c1"},
    ]
    async with open_calling(engine) as wire:
        answer = await wire.chat("", messages=turns, tools=[FIND], return_token_ids=True)
    prompt = bytes(answer.json()["prompt_token_ids"]).decode()
    assert json.loads(prompt.partition(";user:")[0]) == [FIND]
    assert prompt.endswith(";user:When?;assistant:1969;tool:July")


NAMED = {"type": "function", "function": {"name": "find"}}
OTHER = {"type": "function", "function": {"name": "other"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [FIND], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [FIND], "tool_choice": OTHER}, "tool_choice"),
        # Without a grammar nothing can be demanded.
        ({"tools": [FIND], "tool_choice": "required"}, "tools"),
        ({"tools": [FIND], "tool_choice": NAMED}, "tools"),
        ({"tools": [FIND], "parallel_tool_calls": False}, "tools"),
        ({"tools": [FIND], "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "user", "content": "a", "tool_call_id": "c"}]}, "messages.0"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0"),
    ],
    ids=json.dumps,
)
async def test_what_cannot_be_served_is_refused_by_name(open_calling, fields, param):
    """A tool that is silently not offered is an answer that was made up."""
    async with open_calling() as wire:
        response = await wire.chat("hi", **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)


async def test_arguments_that_are_sent_back_must_be_json(open_calling):
    """Templates get them as an object."""
    call = {"id": "c", "type": "function", "function": {"name": "find", "arguments": "{1969"}}
    turns = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    async with open_calling() as wire:
        response = await wire.chat("", messages=turns)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages.0.tool_calls.0.function.arguments"
    assert "1969" not in response.text


async def test_a_server_or_a_model_without_tools_says_so(wire, open_calling):
    """The one needs a flag, the other another model."""
    response = await wire.chat("hi", tools=[FIND])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
    assert "--tool-call-parser" in response.json()["error"]["message"]
    engine = FakeEngine()
    engine.tokenizer.chat_template = "{{ messages[0].content }}"
    async with open_calling(engine) as calling:
        response = await calling.chat("hi", tools=[FIND])
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
        assert (await calling.chat("hi")).status_code == 200


class Demanding:
    """Parsers that demand a grammar for calls, as vLLM's do for `required` and for a name."""

    calls_tools = True

    def __init__(self, engine):
        self.plain = make_parsers(engine)

    def rules(self, tools):
        rules = self.plain.rules(tools and ToolUse(tools=tools.tools))
        return replace(rules, grammar=Grammar("structural_tag", "{}") if tools else None)


class GuidedFake(FakeEngine):
    """Takes one grammar and no other."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def check_grammar(self, grammar):
        if self.asked and grammar.kind == "structural_tag":
            raise ValueError("once is enough")

    def generate(self, request):
        self.asked.append(request.sampling.grammar)
        return super().generate(request)


async def test_the_engine_is_held_to_the_call_that_is_demanded(open_calling):
    """One named function ends with "stop", as OpenAI has it; a bad schema of a tool is a 400."""
    engine = GuidedFake()
    async with open_calling(engine, parsers=Demanding(engine)) as wire:
        body = (await wire.chat(CALL % 7, tools=[FIND], tool_choice=NAMED)).json()
        assert body["choices"][0]["finish_reason"] == "stop"
        assert len(body["choices"][0]["message"]["tool_calls"]) == 1
        both = {"tools": [FIND], "response_format": {"type": "json_object"}}
        refused = await wire.chat(CALL % 7, **both)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")
        refused = await wire.chat(CALL % 7, tools=[FIND], tool_choice="required")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")
    assert engine.asked == [Grammar("structural_tag", "{}")]


async def test_the_official_client_streams_calls(open_calling):
    """Its accumulating helper joins the pieces of the arguments."""
    async with open_calling() as wire:
        client = openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="none", http_client=wire.http, max_retries=0
        )
        async with client.chat.completions.stream(
            model="fake",
            messages=[{"role": "user", "content": CALL % 1969}],
            tools=[FIND],
            extra_body={"risk": True},
        ) as stream:
            final = await stream.get_final_completion()
    (choice,) = final.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("find", {"year": 1969})
