"""Reasoning, JSON and tool calls through a real engine: tiny random weights, held by grammars.

Such a model means nothing by what it writes; a grammar makes it a call all the same, and a bias on
`</think>` ends its reasoning. The service runs in this process, over the engine of the module.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import pytest_asyncio

from server.engines.fake_model import IM_END, fake_tokenizer
from tests.answers import both_ways
from tests.contract.conftest import Wire, make_fake_app, make_fake_service
from tests.contract.oracle import families, make_folder, reference_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
FIND = {
    "type": "function",
    "function": {
        "name": "find",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "year": {"enum": [1851, 1969]},
                "of": {"type": "string", "maxLength": 6},
            },
            "required": ["year", "of"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = FIND["function"]["parameters"]
NAMED = {"type": "function", "function": {"name": "find"}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def wire(start_engine, make_probes, tmp_path_factory) -> AsyncIterator[Wire]:
    """A model of bytes that knows all markup, with a probe of random neurons."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = fake_tokenizer()
    tokenizer.add_tokens(MARKUP, special_tokens=True)
    llama = families(128, head_dim=32)["llama"]

    def config() -> Any:
        made = llama.config()
        made.update({"vocab_size": 264, "eos_token_id": IM_END, "bos_token_id": 256})
        return made

    make_folder(replace(llama, config=config), folder, "float32")
    tokenizer.save_pretrained(folder)
    reference = reference_of(folder, llama.down, transposed=llama.transposed)
    engine = start_engine(
        folder,
        make_probes(folder, reference),
        reasoning_parser="deepseek_r1",
        tool_call_parser="hermes",
    )
    service = make_fake_service(engine, parsers=engine.parsers)
    transport = httpx.ASGITransport(make_fake_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield Wire(http, engine, service)
    await engine.aclose()


@pytest.fixture
def ending(wire) -> dict[str, Any]:
    """A request whose reasoning ends at once and whose JSON has neither blanks nor controls."""
    think_end = wire.engine.tokenizer.convert_tokens_to_ids("</think>")
    bias = {str(think_end): 100, **{str(blank): -100 for blank in range(0x21)}}
    return {"temperature": 0, "max_tokens": 200, "risk": True, "logit_bias": bias}


@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
async def test_a_call_that_is_demanded_is_made_with_a_risk_for_every_token(wire, ending, choice):
    """Held to the tool's own schema; every entry points into the arguments of the call."""
    fields = {**ending, "tools": [FIND], "tool_choice": choice, "parallel_tool_calls": False}
    (found,) = await both_ways(wire, "When?", **fields)
    ((name, arguments),) = found["calls"]
    assert name == "find"
    called = json.loads(arguments)
    assert set(called) == {"year", "of"}
    assert called["year"] in (1851, 1969)
    assert found["finish"] == ("stop" if choice == NAMED else "tool_calls")
    risk = found["risk"]
    assert risk["status"] == "scored"
    entries = [token for token in risk["tokens"] if token["segment"] == "tool_call"]
    assert "".join(token["token"] for token in entries) == arguments
    assert all(token["risk"] is not None for token in entries if token["token"])
    assert {token["tool_call_index"] for token in entries} == {0}


async def test_a_grammar_holds_the_content_and_not_the_reasoning(wire, ending):
    """Where the reasoning ends the JSON begins, and before it nothing is held to anything."""
    named = {"name": "find", "schema": SCHEMA}
    fields = {**ending, "response_format": {"type": "json_schema", "json_schema": named}}
    (found,) = await both_ways(wire, "When?", **fields)
    assert json.loads(found["text"])["year"] in (1851, 1969)
    assert found["risk"]["tokens"][0]["token"] == ""  # `</think>`
    (thinking,) = await both_ways(wire, "When?", **{**fields, "logit_bias": None, "max_tokens": 12})
    assert (thinking["text"], thinking["finish"]) == ("", "length")
    assert {token["segment"] for token in thinking["risk"]["tokens"]} == {"reasoning"}
    assert (thinking["risk"]["status"], thinking["risk"]["reason"]) == ("unavailable", "no_text")
    assert all(token["risk"] is not None for token in thinking["risk"]["tokens"])


async def test_a_tool_whose_schema_has_no_grammar_is_refused(wire, ending):
    """400 before anything starts; the engine goes on."""
    function = {**FIND["function"], "parameters": {"type": "nothing"}}
    fields = {"tools": [{**FIND, "function": function}], "tool_choice": NAMED}
    response = await wire.chat("When?", **ending, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
    assert (await wire.chat("When?", max_tokens=1)).status_code == 200
