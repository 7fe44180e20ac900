"""`response_format`: what is refused, and what an engine that knows grammars is told.

That the text obeys is the engine's part (tests/engines/test_service.py); here an engine writes what
a script says.
"""

from __future__ import annotations

import json

import openai
import pytest
from pydantic import BaseModel

from server.engines.base import Grammar
from server.engines.fake import FakeEngine
from tests.answers import check_choice, flattened, joined

ANSWER = '{"author": "Melville", "year": 1851}'
SCHEMA = {
    "type": "object",
    "properties": {"year": {"type": "integer"}, "author": {"type": "string"}},
    "required": ["year", "author"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "book", "schema": SCHEMA, "strict": True}}


class GuidedFake(FakeEngine):
    """Writes `ANSWER`, keeps what it was asked for, and knows every schema without `multipleOf`."""

    def __init__(self):
        super().__init__(answer=ANSWER.encode())
        self.asked = []

    def check_grammar(self, grammar):
        if "multipleOf" in grammar.text:
            raise ValueError(f"cannot compile {grammar}")

    def generate(self, request):
        self.asked.append(request.sampling.grammar)
        return super().generate(request)


@pytest.mark.parametrize("wanted", [NAMED, {"type": "json_object"}], ids=lambda w: w["type"])
async def test_an_engine_without_grammars_refuses_and_says_which_has_them(wire, wanted):
    """Free text where JSON was promised breaks the client's parser, not ours."""
    for stream in (False, True):
        response = await wire.chat("hi", response_format=wanted, stream=stream)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "response_format")
        assert "--engine vllm" in error["message"]


async def test_the_engine_gets_the_schema_for_every_choice(open_wire):
    """In the client's order of properties: that is the order in which they are written."""
    engine = GuidedFake()
    async with open_wire(engine) as wire:
        assert (await wire.chat("hi", n=2, response_format=NAMED)).status_code == 200
        assert (await wire.chat("hi", response_format={"type": "json_object"})).status_code == 200
        assert (await wire.chat("hi", response_format={"type": "text"})).status_code == 200
        assert (await wire.chat("hi", response_format=None)).status_code == 200
    compact = json.dumps(SCHEMA, separators=(",", ":"))
    wanted, anything = Grammar("json", compact), Grammar("json", '{"type":"object"}')
    assert engine.asked == [wanted, wanted, anything, None, None]


async def test_json_has_a_risk_for_every_token_streamed_or_not(open_wire):
    """I1, I2 under a grammar: braces and keys are tokens like others."""
    fields = {"response_format": NAMED, "risk": True, "logprobs": True}
    async with open_wire(GuidedFake()) as wire:
        whole, usage = flattened((await wire.chat("hi", **fields)).json())
        chunks = await wire.chunks("hi", stream_options={"include_usage": True}, **fields)
    assert (whole, usage) == joined(chunks)
    check_choice(whole[0])
    assert whole[0]["text"] == ANSWER
    assert len(whole[0]["risk"]["tokens"]) == usage["completion_tokens"] == len(ANSWER) + 1
    assert [span["text"] for span in whole[0]["risk"]["spans"]] == ["1851"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            "response_format.json_schema.name",
        ),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format.schema"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": NAMED, "ignore_eos": True}, "ignore_eos"),
    ],
    ids=json.dumps,
)
async def test_a_wrong_format_is_refused_by_name(open_wire, fields, param):
    """Nothing was started, and the path says what to repair."""
    engine = GuidedFake()
    async with open_wire(engine) as wire:
        response = await wire.chat("hi", **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert engine.asked == []


@pytest.mark.parametrize(
    "schema",
    [{"type": "integer", "multipleOf": 1851}, {"enum": ["1851" * 20_000]}],
    ids=["no", "long"],
)
async def test_a_schema_that_cannot_be_kept_is_the_clients_error(open_wire, schema):
    """400 before anything starts; the sentence quotes nothing of the schema."""
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    engine = GuidedFake()
    async with open_wire(engine) as wire:
        for stream in (False, True):
            response = await wire.chat("hi", response_format=wanted, stream=stream)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "response_format.json_schema.schema"
            assert "1851" not in response.text
    assert engine.asked == []


async def test_the_official_client_parses_into_a_model(open_wire):
    """`chat.completions.parse` sends the model's schema and validates what comes back."""

    class Book(BaseModel):
        author: str
        year: int

    async with open_wire(GuidedFake()) as wire:
        client = openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="none", http_client=wire.http, max_retries=0
        )
        answer = await client.chat.completions.parse(
            model="fake",
            messages=[{"role": "user", "content": "hi"}],
            response_format=Book,
            extra_body={"risk": True},
        )
    assert answer.choices[0].message.parsed == Book(author="Melville", year=1851)
    assert answer.choices[0].risk["status"] == "scored"
