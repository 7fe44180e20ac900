"""The official `openai` client against the wire: what it keeps, and that nothing confuses it."""

from __future__ import annotations

import time

import openai
import pytest

MESSAGES = [{"role": "user", "content": "né 😀 in 1969."}]


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_whole_answer_carries_risk_on_the_choice_and_in_logprobs(client):
    """Users read `choices[0].risk`; frameworks keep only `logprobs.content[].risk`."""
    answer = client.chat.completions.create(
        model="fake", messages=MESSAGES, logprobs=True, top_logprobs=3, extra_body={"risk": True}
    )
    choice = answer.choices[0]
    assert choice.message.content == "né 😀 in 1969."
    assert choice.finish_reason == "stop"
    assert choice.risk["status"] == "scored"
    assert choice.risk["flagged"] is True
    assert [span["text"] for span in choice.risk["spans"]] == ["1969"]
    tokens = choice.risk["tokens"]
    assert len(tokens) == answer.usage.completion_tokens == len(choice.logprobs.content)
    assert [entry.risk for entry in choice.logprobs.content] == [t["risk"] for t in tokens]
    assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)
    text = choice.message.content
    assert all(text[t["start"] : t["end"]] == t["token"] for t in tokens)
    assert bytes(b for e in choice.logprobs.content[:-1] for b in e.bytes).decode() == text


def test_a_streamed_answer_is_the_whole_answer_in_pieces(client):
    """A client that reads chunks must end with what a client that waits gets."""
    arguments = {"model": "fake", "messages": MESSAGES, "logprobs": True}
    whole = client.chat.completions.create(**arguments, extra_body={"risk": True})
    stream = client.chat.completions.create(
        **arguments,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"risk": True},
    )
    text, tokens, entries, usage, last = "", [], [], None, None
    for chunk in stream:
        if not chunk.choices:
            usage = chunk.usage
            continue
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        tokens += (getattr(choice, "risk", None) or {}).get("tokens", [])
        entries += choice.logprobs.content if choice.logprobs else []
        last = choice if choice.finish_reason else last
    assert text == whole.choices[0].message.content
    assert tokens == whole.choices[0].risk["tokens"]
    assert entries == whole.choices[0].logprobs.content
    assert usage == whole.usage
    assert {**last.risk, "tokens": tokens} == whole.choices[0].risk


def test_the_accumulating_stream_helper_keeps_risk_in_logprobs(client):
    """`.stream()` drops unknown fields of a choice; the entry in logprobs is the way out."""
    with client.chat.completions.stream(
        model="fake", messages=MESSAGES, logprobs=True, extra_body={"risk": True}
    ) as stream:
        final = stream.get_final_completion()
    risks = [entry.risk for entry in final.choices[0].logprobs.content]
    assert max(risk for risk in risks if risk is not None) > 0.9
    assert risks[-1] is None


def test_no_usage_chunk_unless_asked_for(client):
    """A chunk without choices breaks clients that index `choices[0]`."""
    stream = client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
    assert all(len(chunk.choices) == 1 for chunk in stream)


def test_n_choices_have_risks_of_their_own(client):
    """Risks of neighbours must not be mixed up, streamed or not."""
    arguments = {"model": "fake", "messages": MESSAGES, "n": 3, "seed": 5}
    whole = client.chat.completions.create(**arguments, extra_body={"risk": True})
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) > 1
    total = sum(len(choice.risk["tokens"]) for choice in whole.choices)
    assert total == whole.usage.completion_tokens
    texts, finished = ["", "", ""], []
    for chunk in client.chat.completions.create(
        **arguments, stream=True, extra_body={"risk": True}
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        if chunk.choices[0].finish_reason:
            finished.append(chunk.choices[0].index)
    assert texts == [choice.message.content for choice in whole.choices]
    assert sorted(finished) == [0, 1, 2]


def test_completions_and_models(client):
    """The older route and the list of models, as the client calls them."""
    answer = client.completions.create(
        model="fake", prompt=["in 1969", "ab"], logprobs=2, extra_body={"risk": True}
    )
    assert [choice.text for choice in answer.choices] == ["in 1969", "ab"]
    assert answer.choices[0].logprobs.text_offset[:3] == [0, 1, 2]
    assert answer.choices[0].risk["spans"][0]["text"] == "1969"
    assert [model.id for model in client.models.list()] == ["fake", "other-name"]
    assert client.models.retrieve("other-name").id == "other-name"


def test_refusals_are_the_clients_own_exceptions(client):
    """`except openai.BadRequestError as e: e.param` is how applications handle them."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="fake", messages=MESSAGES, extra_body={"risk": {"alpha": 4}}
        )
    assert refused.value.param == "risk.alpha"
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"


def test_a_failure_in_the_stream_is_an_exception_not_a_short_answer(client):
    """A stream that just ends looks like a complete answer to this client."""
    stream = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "abc[fail:3]"}], stream=True
    )
    with pytest.raises(openai.APIError) as failed:
        list(stream)
    assert failed.value.code == "nonfinite_logits"


def test_a_closed_stream_frees_the_engine(client, live):
    """Otherwise every impatient user leaves a generation behind."""
    stream = client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "x[loop] [slow:5]"}],
        stream=True,
        max_tokens=4000,
    )
    next(iter(stream))
    assert live.engine.health().running == 1
    stream.close()
    deadline = time.monotonic() + 1  # the promise: aborted within a second
    while live.engine.health().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert live.engine.health().running == 0
