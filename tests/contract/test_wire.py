"""The routes over the fake engine: what is honoured, what is refused and how, what is counted."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from probes.calibration import Platt
from server.api.answers import ScoredText, TextCompletion
from server.api.errors import _path
from server.api.listings import ModelList, ProbeList
from server.engines.fake import FakeEngine
from server.engines.fake_model import fake_logits, fake_probe
from tests.contract.conftest import events

FIELDS = {
    "n": [0, 9, 2**31, -1, True, "1", 1.5],
    "temperature": [-0.01, 2.01, True, "1", []],
    "top_p": [0, 1.01, "1"],
    "top_k": [-2, 2**31, 1.5],
    "min_p": [-0.1, 1.1],
    "seed": [-1, 2**62 + 1, "1", 1.5],
    "max_tokens": [0, -1, 2**31, True, "5"],
    "max_completion_tokens": [0, "5"],
    "stop": ["", [""], ["a"] * 5, "a" * 257, 5, [5]],
    "presence_penalty": [-2.01, 2.01],
    "frequency_penalty": [-2.01, 2.01],
    "repetition_penalty": [0, 2.01],
    "logit_bias": [{"a": 1}, {"-1": 1}, {"01": 1}, {"1": 101}, {"1": "1"}, {"259": 1}, []],
    "stream": ["true", 1],
    "stream_options": [{"include_usage": True}, {"other": True}],  # without stream
    "top_logprobs": [21, -1, 5],  # without logprobs
    "response_format": [{"type": "json_object"}, {"type": "regex"}, "text"],
    "messages": [[], "hi", [{"role": "user"}], [{"role": "tool", "content": "x"}], None],
    "model": [None, 5],
    "risk": ["yes", 1, []],
    "user": [5, "x" * 513],
}
RISK_FIELDS = {
    "alpha": [-0.01, 3.01, True, "1", None, 2**63 - 1],
    "threshold": [-0.01, 1.01, True, "0.5", None],
    "probe": [5, None],
    "tokens": [1, "true", None],
    "contributors": [-1, 11, True, 1.5],
    "policy": ["block", None, 1],
    "unknown": [1, None],
}
REFUSED = [
    *((field, {field: value}) for field, values in FIELDS.items() for value in values),
    *((f"risk.{k}", {"risk": {k: value}}) for k, values in RISK_FIELDS.items() for value in values),
    *((field, {field: []}) for field in ("tools", "functions", "documents", "prompt_logprobs")),
    *((field, {field: 1}) for field in ("best_of", "echo", "suffix", "chat_template", "audio")),
]


@pytest.mark.parametrize(("param", "fields"), REFUSED, ids=json.dumps)
async def test_what_is_out_of_bounds_is_refused_by_name(wire, param, fields):
    """Coerced or ignored, a wrong value gives an answer that nobody asked for."""
    response = await wire.chat("hi", **fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"].split(".")[: param.count(".") + 1] == param.split(".")
    assert error["type"] == "invalid_request_error"
    page = wire.service.metrics.render().decode()
    assert not re.search(r"^hneurons_requests_total{.*} [1-9]", page, re.MULTILINE)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "n": 1, "seed": 0},
        {"temperature": 2, "top_k": 0, "n": 8, "stop": ["a" * 256] * 4, "max_tokens": 1},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 2.0},
        {"logit_bias": {"0": -100, "258": 100}, "logprobs": True, "top_logprobs": 20},
        {"response_format": {"type": "text"}, "ignore_eos": False, "stop": []},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"safety_identifier": "x", "prompt_cache_key": "y"},
        {"risk": {"alpha": 3, "threshold": 1, "contributors": 10, "tokens": True}},
        {"risk": {"alpha": 0, "threshold": 0, "contributors": 0, "policy": "flag"}},
        dict.fromkeys(["temperature", "n", "stop", "seed", "max_tokens", "stream", "risk"]),
        dict.fromkeys(["logprobs", "top_logprobs", "logit_bias", "response_format", "user"]),
    ],
    ids=json.dumps,
)
async def test_what_is_within_bounds_is_taken(wire, fields):
    """The bounds themselves, and OpenAI's nullable fields as null."""
    response = await wire.chat("hi", **fields)
    assert response.status_code == 200, response.text


async def test_what_the_engine_cannot_honour_is_refused_by_name(wire, monkeypatch):
    """As with vLLM's drafts; a field at its default, or null, asks for nothing."""
    card = replace(wire.engine.card, refused_sampling={"min_p": "it drafts"})
    monkeypatch.setattr(wire.engine, "card", card)
    response = await wire.chat("hi", min_p=0.1)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "min_p"
    assert "it drafts" in response.json()["error"]["message"]
    for value in (0, None):
        assert (await wire.chat("hi", min_p=value)).status_code == 200


async def test_a_message_that_was_an_answer_can_be_sent_back(wire):
    """Clients append `message.model_dump()` to the conversation."""
    message = (await wire.chat("hi")).json()["choices"][0]["message"]
    dumped = {**message, "tool_calls": None, "function_call": None, "audio": None}
    turns = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {**dumped, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    response = await wire.chat("", messages=turns, return_token_ids=True)
    assert response.json()["choices"][0]["message"]["content"] == "ab"
    prompt = bytes(i for i in response.json()["prompt_token_ids"] if i < 256)
    assert prompt.startswith(b"system\nbe brief")


async def test_a_call_of_a_tool_may_come_back_without_content_and_with_its_index(wire):
    """OpenAI's own type does not ask for it, and clients leave out what is null; streamed calls
    have an index. Of all other roles the content is asked for by name."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"index": 0, **call}]},
        {"role": "tool", "tool_call_id": "c", "content": "5"},
    ]
    assert (await wire.chat("", messages=turns)).status_code == 200
    for turn in ({"role": "user"}, {"role": "tool", "tool_call_id": "c"}):
        error = (await wire.chat("", messages=[turn])).json()["error"]
        assert (error["param"], error["code"]) == (
            "messages.0.content",
            "missing_required_parameter",
        )


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/completions", "prompt", [-1] * 100_000),
        ("/v1/completions", "prompt", [["x"] * 1000] * 60),
        (
            "/v1/chat/completions",
            "messages",
            [{"role": "user", "content": [{"type": "text"}] * 100}] * 600,
        ),
        ("/v1/risk", "token_ids", ["x"] * 100_000),
        ("/v1/completions", "logit_bias", {f"x{i}": "x" for i in range(50_000)}),
        ("/v1/completions", "metadata", {f"x{i}": i for i in range(50_000)}),
        ("/v1/risk", "risk", {f"x{i}": i for i in range(50_000)}),
    ],
)
async def test_a_body_that_is_all_mistakes_is_refused_at_the_first(
    wire, monkeypatch, path, field, value
):
    """One finding for each would hold every stream up for a second."""
    found = []
    monkeypatch.setattr(
        "server.api.errors._path",
        lambda finding, body, path=_path: found.append(1) or path(finding, body),
    )
    response = await wire.http.post(path, json={"model": "fake", field: value})
    assert response.status_code == 400
    assert len(found) < 20


async def test_a_path_with_a_slash_too_many_is_no_redirect(wire):
    """It would lead to whatever the Host header says, in plain HTTP, prompt and all."""
    response = await wire.http.post("/v1/chat/completions/", json={})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


async def test_names_of_models_and_probes(wire):
    """404 with a code, as OpenAI; a full `name@sha` names a probe, too."""
    response = await wire.chat("hi", model="gpt-9")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert (await wire.chat("hi", model="other-name")).json()["model"] == "fake"
    response = await wire.chat("hi", risk={"probe": "nothing"})
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "risk.probe"
    probe = wire.engine.probes[0]
    for name in (probe.card.name, probe.id):
        answer = (await wire.chat("hi", risk={"probe": name})).json()
        assert answer["choices"][0]["risk"]["probe"] == probe.id


async def test_a_server_without_a_probe_answers_and_refuses_risk(open_wire):
    """That is how `offline collect` starts on a new model; never a risk without a probe."""
    async with open_wire(FakeEngine(probes=[])) as wire:
        assert (await wire.chat("hi")).status_code == 200
        assert (await wire.chat("hi", risk=False)).status_code == 200
        for risk in (True, {}, {"alpha": 0.5}):
            response = await wire.chat("hi", risk=risk)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "risk")
        assert (await wire.http.get("/v1/probes")).json()["data"] == []


async def test_risk_by_default_and_how_to_switch_it_off(open_wire):
    """`--risk-by-default` speaks for requests that say nothing."""
    async with open_wire(risk_by_default=True) as wire:
        assert "risk" in (await wire.chat("hi")).json()["choices"][0]
        assert "risk" not in (await wire.chat("hi", risk=False)).json()["choices"][0]


async def test_applied_values_are_echoed(wire):
    """What was asked for and what was done must be comparable."""
    risk = (await wire.chat("7", risk={"threshold": 0.25, "alpha": 0.5})).json()["choices"][0][
        "risk"
    ]
    assert (risk["threshold"], risk["token_threshold"], risk["operating_point"]) == (
        *(0.25, 0.25),
        None,
    )
    assert (risk["alpha"], risk["calibrated"]) == (0.5, False)
    risk = (await wire.chat("7", risk=True)).json()["choices"][0]["risk"]
    assert (risk["threshold"], risk["operating_point"], risk["alpha"]) == (0.5, "fpr_5", 1.0)


@pytest.mark.parametrize(
    ("risk", "param"), [({"alpha": 0.5}, "risk.alpha"), ({"policy": "retry"}, "risk.policy")]
)
async def test_a_server_without_suppression_refuses_what_needs_it(open_wire, risk, param):
    """The meter of such a server has no buffers for alpha; the request must not reach it."""
    async with open_wire(suppression=False) as wire:
        response = await wire.chat("hi", risk=risk)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert (await wire.chat("hi", risk={"alpha": 1})).status_code == 200


async def test_a_server_without_suppression_says_so_of_its_probes(open_wire):
    """The page and the sweep go by it; else the first thing that they learn is a 400."""
    async with open_wire(suppression=False) as wire:
        (probe,) = (await wire.http.get("/v1/probes")).json()["data"]
    assert probe["suppression"] is False
    assert probe["h_neurons"] == 3


async def test_tokens_can_be_left_out_and_neurons_can_be_named(wire):
    """The two ends of verbosity."""
    chunks = await wire.chunks("in 1969", risk={"tokens": False})
    assert all("risk" not in c["choices"][0] for c in chunks[:-1])
    assert chunks[-1]["choices"][0]["risk"]["tokens"] == []
    assert chunks[-1]["choices"][0]["risk"]["spans"][0]["text"] == "1969"
    risk = (await wire.chat("7", risk={"contributors": 2})).json()["choices"][0]["risk"]
    first, end = risk["tokens"]
    assert [set(entry) for entry in first["contributors"]] == [{"layer", "neuron", "value"}] * 2
    assert end["contributors"] == []


async def test_the_context_is_a_limit_with_a_code_of_its_own(open_wire):
    """Clients shorten the conversation when they see this code."""
    async with open_wire(FakeEngine(max_model_len=60)) as wire:
        too_long = await wire.chat("x" * 60)
        assert too_long.json()["error"]["code"] == "context_length_exceeded"
        assert too_long.json()["error"]["param"] == "messages"
        too_much = await wire.chat("x", max_tokens=60)
        assert too_much.json()["error"]["code"] == "context_length_exceeded"
        assert too_much.json()["error"]["param"] == "max_tokens"
        filled = (await wire.chat("x[loop]", ignore_eos=True)).json()
        assert filled["usage"]["total_tokens"] == 60
        body = {"prompt_token_ids": [1] * 30, "token_ids": [1] * 31}
        response = await wire.http.post("/v1/risk", json=body)
        assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_unset_max_tokens_ends_at_the_servers_default(open_wire):
    """A model that never ends must not hold a slot until the context is full."""
    async with open_wire(default_max_tokens=7) as wire:
        answer = (await wire.chat("x[loop]")).json()
    assert answer["usage"]["completion_tokens"] == 7
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_the_budget_of_one_request(open_wire):
    """n times max_tokens is what one request may cost."""
    async with open_wire(max_total_tokens=100) as wire:
        assert (await wire.chat("x", n=2, max_tokens=50)).status_code == 200
        response = await wire.chat("x", n=2, max_tokens=51)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")


async def test_a_template_that_refuses_the_roles_is_a_400_with_its_reason(open_wire):
    """Some models know no system role; that is the client's to repair."""
    engine = FakeEngine()
    engine.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    async with open_wire(engine) as wire:
        response = await wire.chat("hi")
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "chat_template_error"
        assert "System role not supported" in response.json()["error"]["message"]
        engine.tokenizer.chat_template = None
        response = await wire.chat("hi")
        assert response.status_code == 400
        assert "/v1/completions" in response.json()["error"]["message"]


async def complete(wire, prompt, **fields):
    body = {"model": "fake", "prompt": prompt, **fields}
    return await wire.http.post("/v1/completions", json=body)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("in 7", ["in 7"]),
        (["in 7", "x"], ["in 7", "x"]),
        ([105, 110], ["in"]),
        ([[105, 110], [120]], ["in", "x"]),
    ],
)
async def test_the_four_shapes_of_a_prompt(wire, prompt, texts):
    """Each gives a choice per prompt, streamed or not."""
    response = await complete(wire, prompt, risk=True, logprobs=1, return_token_ids=True)
    answer = response.json()
    TextCompletion.model_validate(answer)
    assert [choice["text"] for choice in answer["choices"]] == texts
    for choice in answer["choices"]:
        assert choice["token_ids"][:-1] == list(choice["text"].encode())
        assert len(choice["risk"]["tokens"]) == len(choice["logprobs"]["tokens"])
    streamed = (await complete(wire, prompt, stream=True)).text.split("\n\n")
    joined = dict.fromkeys(range(len(texts)), "")
    for line in streamed[:-2]:
        chunk = json.loads(line.removeprefix("data: "))
        TextCompletion.model_validate(chunk)
        joined[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert list(joined.values()) == texts


async def test_choices_of_prompts_are_numbered_prompt_by_prompt(wire):
    """OpenAI's order; usage counts each prompt once."""
    answer = (await complete(wire, ["ab", "c"], n=2)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "ab", "c", "c"]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 10, "total_tokens": 13}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [259]},
        {"prompt": [-1]},
        {"prompt": ["a"] * 65},
        {"prompt": ["a", 5]},
        {"logprobs": 21},
        {"logprobs": True},
        {"echo": True},
        {"suffix": "x"},
        {"best_of": 2},
    ],
    ids=json.dumps,
)
async def test_completions_refuse_by_name(wire, fields):
    """The same strictness on the older route."""
    response = await complete(wire, **{"prompt": "a", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"].split(".")[0] == next(iter(fields))


async def test_scoring_a_given_answer_equals_having_generated_it(wire):
    """The fake repeats the question, so question and answer can be given back."""
    text = "né 😀 in 1969"
    generated = (await wire.chat(text, risk={"contributors": 2}, return_token_ids=True)).json()
    body = {
        "messages": [{"role": "user", "content": text}],
        "answer": text,
        "risk": {"contributors": 2},
    }
    given = (await wire.http.post("/v1/risk", json=body)).json()
    ScoredText.model_validate(given)
    expected = generated["choices"][0]["risk"]
    without_end = {**expected, "tokens": expected["tokens"][:-1], "unscored": {}}
    assert given["risk"] == without_end
    assert given["usage"] == {
        "prompt_tokens": generated["usage"]["prompt_tokens"],
        "scored_tokens": len(text.encode()),
    }
    by_ids = {
        "prompt_token_ids": generated["prompt_token_ids"],
        "token_ids": generated["choices"][0]["token_ids"][:-1],
        "risk": {"contributors": 2},
    }
    assert (await wire.http.post("/v1/risk", json=by_ids)).json()["risk"] == given["risk"]


@pytest.mark.parametrize("position", ["read", "write"])
async def test_scoring_reads_at_the_probes_position(open_wire, position):
    """A `write` probe reads the token before; mixed up, all risks move by one token."""
    async with open_wire(FakeEngine(probes=[fake_probe(position=position)])) as wire:
        body = {"prompt": "7", "text": "a1b"}
        risk = (await wire.http.post("/v1/risk", json=body)).json()["risk"]
    ids, lag = b"7a1b", 0 if position == "read" else 1
    logits = [fake_logits(ids[i - lag], i - lag)[0] for i in (1, 2, 3)]
    calibration = Platt(slope=1.0, intercept=0.0)
    assert [t["risk"] for t in risk["tokens"]] == [
        pytest.approx(calibration.risk(logit)) for logit in logits
    ]
    assert risk["status"] == "scored"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"prompt": "a"}, None),
        ({"prompt": "a", "answer": "b"}, None),
        ({"prompt": "a", "text": "b", "token_ids": [1]}, None),
        ({"prompt": "", "text": "b"}, "prompt"),
        ({"prompt": "a", "text": ""}, "text"),
        ({"prompt": "a", "text": "b", "risk": False}, "risk"),
        ({"prompt": "a", "text": "b", "risk": {"policy": "stop"}}, "risk.policy"),
        ({"prompt": "a", "text": "b", "model": "x"}, "model"),
        ({"prompt": "a", "text": "b", "stream": True}, "stream"),
        ({"prompt_token_ids": [1], "token_ids": [259]}, "token_ids"),
        ({"prompt_token_ids": [259], "token_ids": [1]}, "prompt_token_ids"),
    ],
    ids=json.dumps,
)
async def test_scoring_refuses_by_name(wire, body, param):
    """One pair, nothing else."""
    response = await wire.http.post("/v1/risk", json=body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param


async def test_models_and_probes_are_listed(wire):
    """What a client needs to know before it asks."""
    models = (await wire.http.get("/v1/models")).json()
    ModelList.model_validate(models)
    assert [model["id"] for model in models["data"]] == ["fake", "other-name"]
    assert (await wire.http.get("/v1/models/fake")).json() == models["data"][0]
    assert (await wire.http.get("/v1/models/x/y")).status_code == 404
    listed = (await wire.http.get("/v1/probes")).json()
    ProbeList.model_validate(listed)
    (probe,) = listed["data"]
    assert probe["default"] is True
    assert (probe["neurons"], probe["h_neurons"], probe["layers"]) == (4, 3, 4)
    assert probe["suppression"] is True
    points = probe["thresholds"]["token"]["operating_points"]
    assert [point["name"] for point in points] == ["fpr_1", "fpr_5", "fpr_10"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": ["a"] * 6, "n": 2}, "prompt"),
        ("/v1/completions", {"prompt": [[1] * 40, [1] * 40]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 8}, "n"),
    ],
)
async def test_what_an_idle_server_could_not_take_is_no_overload(open_wire, path, body, param):
    """A client that honours Retry-After would come back for ever."""
    async with open_wire(room_for_choices=7, room_for_prompt_tokens=60) as wire:
        response = await wire.http.post(path, json={"model": "fake", "max_tokens": 1, **body})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        fits = {"model": "fake", "prompt": [[1] * 30, [1] * 30], "max_tokens": 1}
        assert (await wire.http.post("/v1/completions", json=fits)).status_code == 200


@pytest.mark.parametrize("arguments", ["5", "null", "[1]", '{"a":' * 40 + "1" + "}" * 40])
async def test_arguments_that_no_template_expects_are_refused(wire, arguments):
    """Templates walk through them: a number or a thousand levels is a 500 in the middle of one."""
    function = {"name": "f", "arguments": arguments}
    called = {"id": "x", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
    ]
    body = {"model": "fake", "messages": messages}
    response = await wire.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages.1.tool_calls.0.function.arguments"


async def test_a_template_that_stumbles_over_what_it_is_given_is_no_fault_of_ours(
    wire, monkeypatch
):
    monkeypatch.setattr(wire.engine.tokenizer, "chat_template", "{{ messages[0].content + 1 }}")
    response = await wire.chat("a")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "chat_template_error"


async def test_a_streamed_completion_names_its_prompts_as_the_whole_one_does(wire):
    body = {"model": "fake", "prompt": ["a", "bc"], "max_tokens": 2, "return_token_ids": True}
    whole = (await wire.http.post("/v1/completions", json=body)).json()
    streamed = events((await wire.http.post("/v1/completions", json=body | {"stream": True})).text)
    for choice in whole["choices"]:
        of_choice = [
            chunk["choices"][0]
            for chunk in streamed
            if chunk["choices"][0]["index"] == choice["index"]
        ]
        found = [c["prompt_token_ids"] for c in of_choice if "prompt_token_ids" in c]
        assert found == [choice["prompt_token_ids"]]
        assert "".join(c["text"] for c in of_choice) == choice["text"]


async def test_a_long_answer_with_many_candidates_is_the_same_document(wire, monkeypatch):
    """It is written down on a thread, so that others need not wait for it."""
    body = {"logprobs": True, "top_logprobs": 3, "seed": 1, "max_tokens": 20}
    threads = []

    async def to_thread(work, *arguments):
        threads.append(work)
        return work(*arguments)

    monkeypatch.setattr("server.api.generation.asyncio.to_thread", to_thread)
    inline = (await wire.chat("in 1969", **body)).json()
    assert not threads
    monkeypatch.setattr("server.api.generation.ENTRIES_INLINE", 20)  # fewer tokens, more candidates
    aside = (await wire.chat("in 1969", **body)).json()
    assert len(threads) == 1
    for document in (inline, aside):
        document.pop("id")
        document.pop("created")
    assert aside == inline


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/risk"])
async def test_a_defect_of_ours_is_counted_as_a_failure(wire, monkeypatch, path):
    """The alert on errors saw only what was foreseen: a bug in every answer woke nobody."""

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(type(wire.engine), "generate", broken)
    monkeypatch.setattr(type(wire.engine), "score", broken)
    messages = [{"role": "user", "content": "abc"}]
    body = {"messages": messages} | ({"answer": "abc"} if path == "/v1/risk" else {"model": "fake"})
    response = await wire.http.post(path, json=body)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    page = wire.service.metrics.render().decode()
    counted = 'hneurons_failed_requests_total{model_name="fake",reason="internal_error"} 1.0'
    assert counted in page
    refused = [line for line in page.splitlines() if line.startswith("hneurons_rejected_requests_")]
    assert refused
    assert all(line.endswith(" 0.0") for line in refused)  # it was accepted: counted once


async def test_metrics_tell_what_happened(wire):
    """Dashboards and alerts stand on these names and figures."""
    await wire.chat("in 1969", risk=True)
    await wire.chat("7[nan:1]", risk={"alpha": 0.5})
    await wire.chat("in 1969", risk={"policy": "withhold"}, stream=True)
    await wire.chat("abc[fail:2]")
    page = wire.service.metrics.render().decode()
    name, probe = 'model_name="fake"', f'probe="{wire.engine.probes[0].id}"'

    def value(metric, *labels):
        line = f"{metric}{{{','.join(labels)}}} "
        return next(float(x.removeprefix(line)) for x in page.splitlines() if x.startswith(line))

    assert value("hneurons_requests_total", 'endpoint="chat_completions"', name) == 4
    assert value("hneurons_choices_total", 'finished_reason="stop"', name) == 2
    assert value("hneurons_choices_total", 'finished_reason="content_filter"', name) == 1
    assert value("hneurons_failed_requests_total", name, 'reason="nonfinite_logits"') == 1
    assert value("hneurons_scored_tokens_total", name, probe) == 14
    assert value("hneurons_unscored_tokens_total", name, probe, 'reason="nonfinite"') == 1
    assert value("hneurons_flagged_tokens_total", name, probe) == 8
    assert value("hneurons_flagged_responses_total", name, probe) == 2
    assert value("hneurons_suppressed_responses_total", name, probe) == 1
    assert value("hneurons_policy_actions_total", 'action="withheld"', name, probe) == 1
    assert value("hneurons_monitored_responses_total", name, probe, 'status="scored"') == 2
    assert value("hneurons_monitored_responses_total", name, probe, 'status="unavailable"') == 1
    assert value("hneurons_generation_tokens_total", name) == 8 + 2 + 8 + 1
    assert value("hneurons_time_to_first_token_seconds_count", name) == 4
    assert value("hneurons_inter_token_latency_seconds_count", name) == 7 + 1 + 7
    assert value("hneurons_engine_alive", name) == 1
    assert value("hneurons_requests_running", name) == 0
    count = "hneurons_token_risk_ratio_count"
    assert value(count, name, probe, 'suppressed="false"') == 14
    assert value("hneurons_forward_seconds_total", name) > 0
