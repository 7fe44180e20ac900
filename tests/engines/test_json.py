"""Answers that must be JSON: vLLM holds the model to a grammar, the other says that it cannot.

Neither lets a keyword of a schema go without a word.
"""

from __future__ import annotations

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.answers import check_choice
from tests.engines.test_answers import streamed, text, whole


class Book(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    author: str = Field(max_length=30)
    year: int = Field(ge=1500, le=2000)
    language: Literal["English", "Greek"]


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


BOOK = {"response_format": schema_format(Book.model_json_schema()), "max_tokens": 200}


@pytest.fixture
def holding(client, engine):
    """The client of an engine that holds answers to grammars."""
    if engine == "vllm":
        return client
    with pytest.raises(openai.BadRequestError, match="--engine vllm") as refused:
        text(client, **BOOK)
    assert refused.value.param == "response_format"
    pytest.skip("this engine refuses every grammar, as the lines above have seen")


def test_an_answer_is_json_of_its_schema_with_a_risk_for_every_token(holding):
    """The grammar lets the end of the turn come only after the last brace."""
    choices, usage = whole(holding, **BOOK, risk=True)
    (choice,) = choices
    assert choice["finish"] == "stop"
    Book.model_validate_json(choice["text"])
    check_choice(choice)
    assert choice["risk"]["unscored"] == {"not_read": 1}  # the end of the turn
    assert len(choice["risk"]["tokens"]) == usage["completion_tokens"]
    assert streamed(holding, **BOOK, risk=True) == (choices, usage)
    for sampled in whole(holding, **BOOK, temperature=1.5, n=2, seed=3)[0]:
        Book.model_validate_json(sampled["text"])


def test_json_object_is_any_object(holding):
    """What the model makes of it is its own affair, but it is an object and it ends."""
    (choice,), _ = whole(
        holding, response_format={"type": "json_object"}, max_tokens=300, risk=True
    )
    assert choice["finish"] == "stop"
    assert isinstance(json.loads(choice["text"]), dict)
    assert choice["risk"]["status"] == "scored"


def test_json_cut_by_its_length_is_read_to_the_last_token(holding):
    """The hidden extra step is sampled under the grammar, too, and only its reading counts."""
    (choice,), usage = whole(holding, **{**BOOK, "max_tokens": 4}, risk=True)
    assert choice["finish"] == "length"
    assert choice["text"].lstrip().startswith("{")
    assert len(choice["risk"]["tokens"]) == usage["completion_tokens"] == 4
    assert choice["risk"]["unscored"] == {}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 7}}},
        {"$ref": "#/$defs/missing"},
    ],
    ids=json.dumps,
)
def test_a_schema_without_a_grammar_is_refused_and_harms_nobody(holding, schema):
    """Never a 5xx, and never a keyword that is left out without a word."""
    with pytest.raises(openai.BadRequestError) as refused:
        text(holding, response_format=schema_format(schema))
    assert refused.value.param == "response_format.json_schema.schema"
    assert text(holding, max_tokens=2)
