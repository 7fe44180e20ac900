"""What a client gets, through the packages that clients use: the same from both engines."""

from __future__ import annotations

import pytest
from langchain_openai import ChatOpenAI

from server.api.answers import ScoredText, TextCompletion
from server.policy import WITHHELD
from tests.answers import check_choice, flattened, joined

MESSAGES = [{"role": "user", "content": "Who wrote the novel Moby-Dick, and when was it printed?"}]
BEYOND_OPENAI = {"risk", "return_token_ids", "ignore_eos", "top_k", "min_p", "repetition_penalty"}
NOISE = 0.05  # of a risk in bfloat16, when the same tokens are read in another batch


def request(**fields):
    """Arguments of the client: greedy and short unless told otherwise."""
    extra = {name: fields.pop(name) for name in BEYOND_OPENAI & set(fields)}
    return {
        "model": "demo",
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 16,
        **fields,
        "extra_body": extra,
    }


def whole(client, **fields):
    """Choices and usage, see tests/answers.py."""
    answer = client.chat.completions.create(**request(**fields))
    return flattened(answer.model_dump(exclude_unset=True))


def streamed(client, **fields):
    """The same from a stream."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = client.chat.completions.create(**request(**fields), **options)
    return joined([chunk.model_dump(exclude_unset=True) for chunk in chunks])


def text(client, **fields):
    return client.chat.completions.create(**request(**fields)).choices[0].message.content


def risks(choice):
    return [token["risk"] for token in choice["risk"]["tokens"]]


KINDS = {
    "plain": {},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "token ids": {"return_token_ids": True},
    "neurons": {"risk": {"contributors": 3}},
    "one token": {"max_tokens": 1},
    "stop string": {"stop": "Moby"},
    "sampled": {"temperature": 1, "seed": 7},
    "suppressed": {"risk": {"alpha": 0}},
    "stopped": {"risk": {"policy": "stop", "threshold": 0}},
    "withheld": {"risk": {"policy": "withhold", "threshold": 0}},
    "made again": {"risk": {"policy": "retry", "threshold": 0}},
}


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_streamed_is_whole_and_every_token_has_its_risk(client, fields):
    """I1, I2, I9, I10 on real neurons: a risk that is lost, moved or late is a wrong risk."""
    fields = {"risk": True, **fields}
    (choice,), usage = whole(client, **fields)
    check_choice(choice)
    assert choice["risk"]["status"] == "scored"
    assert len(choice["risk"]["tokens"]) == usage["completion_tokens"] > 0
    assert streamed(client, **fields) == ([choice], usage)


def test_monitoring_changes_no_token(client):
    """I6: what reads must not write."""
    fields = {"logprobs": True, "top_logprobs": 2}
    ((watched,), usage), ((bare,), same_usage) = (
        whole(client, risk=risk, **fields) for risk in (True, False)
    )
    assert (watched["text"], watched["finish"], usage) == (bare["text"], bare["finish"], same_usage)
    assert [entry["logprob"] for entry in watched["logprobs"]] == [
        entry["logprob"] for entry in bare["logprobs"]
    ]
    assert bare["risk"] is None
    assert all("risk" not in entry for entry in bare["logprobs"])


def test_log_probabilities_are_of_the_written_token_and_the_best(client):
    """Greedy: the written one is the best one, or one as good: logits in bfloat16 tie. Sampled at
    top_k 1 likewise."""
    for fields in ({}, {"temperature": 1.5, "top_k": 1}):
        (choice,), _ = whole(client, logprobs=True, top_logprobs=3, **fields)
        assert len(choice["logprobs"]) == 16
        for entry in choice["logprobs"]:
            best = entry["top_logprobs"]
            assert len(best) == 3
            assert entry["token"] in [
                b["token"] for b in best if b["logprob"] == best[0]["logprob"]
            ]
            assert 0 >= entry["logprob"] == best[0]["logprob"] >= best[1]["logprob"]


def test_a_seed_repeats_an_answer_and_choices_differ(client):
    """n choices are answers of their own, each with its risks, however they are mixed."""
    sampled = {"temperature": 1, "seed": 5, "risk": True}
    assert whole(client, **sampled) == whole(client, **sampled)
    for answers in (whole(client, n=2, **sampled), streamed(client, n=2, **sampled)):
        choices, usage = answers
        assert len({choice["text"] for choice in choices}) == 2
        assert usage["prompt_tokens"] == whole(client, max_tokens=1)[1]["prompt_tokens"]
        assert usage["completion_tokens"] == sum(len(risks(choice)) for choice in choices)
        for choice in choices:
            check_choice(choice)


def test_a_stop_string_ends_the_answer_before_it(client):
    """Shown in part, or read no more: both have happened to servers."""
    (plain,), _ = whole(client, risk=True)
    word = plain["text"].split()[4]
    (cut,), _ = whole(client, risk=True, stop=["no such words", word])
    assert cut["finish"] == "stop"
    assert plain["text"].startswith(cut["text"])
    assert cut["text"].rstrip() == plain["text"].partition(word)[0].rstrip() != ""
    shown = [token["risk"] for token in cut["risk"]["tokens"] if token["token"]]
    assert shown == risks(plain)[: len(shown)]


GREEDY = [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1}]


@pytest.mark.parametrize("fields", GREEDY, ids=lambda fields: next(iter(fields)))
def test_what_leaves_one_token_to_choose_is_greedy(client, fields):
    """A field that is accepted and ignored gives an answer that nobody asked for. Compared up to
    where the two best tie, as logits in bfloat16 do: there is more than one token to choose."""
    (plain,), _ = whole(client, logprobs=True, top_logprobs=2)
    (other,), _ = whole(client, logprobs=True, temperature=1.8, seed=1, **fields)
    best = [[one["logprob"] for one in entry["top_logprobs"]] for entry in plain["logprobs"]]
    alone = [first != second for first, second in best]
    until = alone.index(False) if False in alone else len(alone)
    assert until >= 4
    written, expected = (
        [entry["token"] for entry in answer["logprobs"][:until]] for answer in (other, plain)
    )
    assert written == expected


def test_penalties_strike_what_was_written_already(client):
    """Up to the first token that they strike the answer is the same; that one is a repetition."""
    fields = {"return_token_ids": True, "ignore_eos": True, "max_tokens": 32}
    fields["messages"] = [{"role": "user", "content": "Write the word sea ten times."}]
    prompt = client.chat.completions.create(**request(**fields)).prompt_token_ids
    (plain,), _ = whole(client, **fields)
    for penalty, read in {
        "presence_penalty": [],
        "frequency_penalty": [],
        "repetition_penalty": prompt,
    }.items():
        (other,), _ = whole(client, **fields, **{penalty: 2})
        pairs = zip(plain["ids"], other["ids"], strict=True)
        first = next(i for i, (a, b) in enumerate(pairs) if a != b)
        assert plain["ids"][first] in [*read, *plain["ids"][:first]], penalty


def test_a_bias_forces_or_forbids_a_token(client):
    """Likewise ignored by some servers."""
    fields = {"return_token_ids": True, "ignore_eos": True, "max_tokens": 3}
    (plain,), _ = whole(client, **fields)
    token = plain["ids"][0]
    for bias, is_written in ((-100, False), (100, True)):
        (moved,), _ = whole(client, logit_bias={str(token): bias}, **fields)
        assert [found == token for found in moved["ids"]] == [is_written] * 3


def test_alpha_changes_what_is_read_and_leaks_into_no_other_answer(client):
    """I4: beside the same prompt under another alpha, and after it."""
    ((plain,), _) = whole(client, risk=True)
    for alpha in (0, 3):
        ((dosed,), _) = whole(client, risk={"alpha": alpha})
        assert (dosed["risk"]["alpha"], dosed["risk"]["calibrated"]) == (alpha, False)
        assert risks(dosed) != risks(plain)
        assert whole(client, risk=True)[0] == [plain]


def test_a_policy_acts_on_what_is_flagged(client):
    """At threshold 0 everything is; the playground and gateways stand on these words."""
    found = {
        policy: client.chat.completions.create(
            **request(risk={"policy": policy, "threshold": 0})
        ).choices[0]
        for policy in ("flag", "stop", "withhold", "retry")
    }
    assert all(choice.risk["flagged"] for choice in found.values())
    flag, stop, withhold, retry = found.values()
    (span,) = flag.risk["spans"]
    assert span["text"] == flag.message.content
    assert stop.finish_reason == withhold.finish_reason == "content_filter"
    assert len(stop.risk["tokens"]) == 1
    assert flag.message.content.startswith(stop.message.content)
    assert withhold.message.content == WITHHELD
    first, second = retry.risk["attempts"]
    assert (first["alpha"], first["returned"]) == (1, False)
    assert (second["alpha"], second["returned"]) == (0, True)
    assert retry.message.content == text(client, risk={"alpha": 0})


def test_completions_continue_prompts(client):
    """The older route: text, several texts or token ids, streamed or not."""
    create = client.completions.create
    fields = {"model": "demo", "max_tokens": 8, "temperature": 0, "logprobs": 2}
    fields["extra_body"] = {"risk": True, "return_token_ids": True}
    answer = create(prompt="The capital of France is", **fields)
    TextCompletion.model_validate(answer.model_dump(exclude_unset=True))
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == [t["start"] for t in choice.risk["tokens"]]
    assert len(choice.risk["tokens"]) == len(choice.token_ids) == answer.usage.completion_tokens
    assert create(prompt=choice.prompt_token_ids, **fields).choices[0].text == choice.text
    pieces = [
        chunk.choices[0]
        for chunk in create(prompt="The capital of France is", stream=True, **fields)
    ]
    assert "".join(piece.text for piece in pieces) == choice.text
    assert [t for piece in pieces for t in piece.risk["tokens"]] == choice.risk["tokens"]
    several = create(prompt=["The capital of France is", "One, two, three,"], n=2, **fields)
    assert [one.index for one in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text.split()[0] == choice.text.split()[0]
    assert several.choices[0].text != several.choices[2].text


def test_a_given_text_is_read_as_a_written_one(client, server):
    """POST /v1/risk reads in one pass what decoding has read token by token."""
    answer = client.chat.completions.create(**request(risk=True, return_token_ids=True))
    (choice,) = answer.choices
    pairs = (
        {"messages": MESSAGES, "answer": choice.message.content},
        {"prompt_token_ids": answer.prompt_token_ids, "token_ids": choice.token_ids},
    )
    for pair in pairs:
        given = server.client.post("/v1/risk", json={"model": "demo", **pair, "risk": True})
        assert given.status_code == 200, given.text
        ScoredText.model_validate(given.json())
        assert given.json()["usage"] == {
            "prompt_tokens": answer.usage.prompt_tokens,
            "scored_tokens": answer.usage.completion_tokens,
        }
        for one, other in zip(given.json()["risk"]["tokens"], choice.risk["tokens"], strict=True):
            assert (one["token_id"], one["token"]) == (other["token_id"], other["token"])
            assert one["risk"] == pytest.approx(other["risk"], abs=NOISE)


def test_langchain_keeps_every_risk(server):
    """It drops every unknown field but those inside `logprobs.content[]`, and adds chunks up."""
    model = ChatOpenAI(
        model="demo",
        base_url=f"{server.address}/v1",
        api_key="none",
        max_retries=0,
        stream_usage=True,
        logprobs=True,
        temperature=0,
        max_completion_tokens=16,
        extra_body={"risk": True},
    )
    message = model.invoke(MESSAGES)
    first, *rest = model.stream(MESSAGES)
    merged = sum(rest, first)
    for found in (message, merged):
        entries = found.response_metadata["logprobs"]["content"]
        assert [entry["risk"] is not None for entry in entries] == [True] * 16
        assert found.usage_metadata["output_tokens"] == 16
    assert merged.content == message.content
    assert merged.response_metadata["logprobs"] == message.response_metadata["logprobs"]


def test_the_clients_own_stream_helper_keeps_risk_in_logprobs(client):
    """`.stream()` drops unknown fields of a choice; the entry in logprobs is the way out."""
    arguments = request(logprobs=True, risk=True, stop=".", max_tokens=64)
    with client.chat.completions.stream(**arguments) as stream:
        (choice,) = stream.get_final_completion().choices
    (expected,) = client.chat.completions.create(**arguments).choices
    assert choice.finish_reason == expected.finish_reason == "stop"
    assert choice.message.content == expected.message.content
    assert [e.risk for e in choice.logprobs.content] == [e.risk for e in expected.logprobs.content]
