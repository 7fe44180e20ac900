"""langchain-openai drops every unknown field but those inside `logprobs.content[]`."""

from __future__ import annotations

import pytest
from langchain_openai import ChatOpenAI


@pytest.fixture
def model(live):
    return ChatOpenAI(
        model="fake",
        base_url=f"{live.address}/v1",
        api_key="none",
        max_retries=0,
        stream_usage=True,
        logprobs=True,
        extra_body={"risk": True},
    )


def risks(message):
    return [entry["risk"] for entry in message.response_metadata["logprobs"]["content"]]


def test_invoke_keeps_the_risk_of_every_token(model):
    """The only way in which an agent framework sees our risks."""
    message = model.invoke("in 1969")
    assert message.content == "in 1969"
    assert [risk is not None and risk > 0.5 for risk in risks(message)] == [
        *[False] * 3,
        *[True] * 4,
        False,
    ]
    assert risks(message)[-1] is None  # the end of the turn was not read


def test_stream_merges_chunks_without_losing_or_repeating_a_risk(model):
    """LangChain adds chunks up; a repeated scalar or an `index` key in an entry makes it raise."""
    whole = model.invoke("né 😀 in 1969")
    chunks = list(model.stream("né 😀 in 1969"))
    merged = chunks[0]
    for chunk in chunks[1:]:
        merged = merged + chunk
    assert merged.content == whole.content
    assert risks(merged) == risks(whole)
    assert merged.usage_metadata["output_tokens"] == len(risks(whole))
