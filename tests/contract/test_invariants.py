"""The invariants of design.md section 6 over random requests to the fake engine.

I1 risks = tokens = usage; I2 streamed = not streamed; I5 nothing is left behind; I6 monitoring
changes no token; I8 one terminal event per choice; I9 a risk is in [0, 1] or null with a reason;
I10 positions without gap or repetition; I11 one probe per response. I12 (the neighbours) is in
`test_neighbours_change_nothing`.
"""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.answers import ChatCompletion, ChatCompletionChunk
from server.engines.fake import FakeEngine
from server.engines.fake_model import IM_END, fake_probe
from server.policy import WITHHELD

WORDS = ["in", "1969", "the", "7", "né", "日本語", "😀", "👩‍👩‍👧", "a1b2", "", ".", "\n", "[nan:3]"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)
STOPS = st.lists(
    st.sampled_from(["96", "本", "😀", "é 日", "the 7", "x", " ", ". \n"]), max_size=4, unique=True
)
RISKS = st.just(True) | st.fixed_dictionaries(
    {},
    optional={
        "threshold": st.sampled_from([0.0, 0.3, 0.9, 1.0]),
        "alpha": st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        "contributors": st.integers(0, 3),
        "policy": st.sampled_from(["flag", "stop", "withhold", "retry"]),
    },
)
REQUESTS = st.fixed_dictionaries(
    {"risk": RISKS},
    optional={
        "n": st.integers(1, 4),
        "seed": st.integers(0, 9),
        "max_tokens": st.integers(1, 30),
        "stop": STOPS,
        "logprobs": st.just(True),
        "return_token_ids": st.just(True),
    },
)
MANY = settings(max_examples=80)


def joined(chunks):
    """The whole answer that the chunks of a stream add up to."""
    choices, usage = {}, None
    for chunk in chunks:
        assert "error" not in chunk, chunk
        ChatCompletionChunk.model_validate(chunk)
        if not chunk["choices"]:
            assert usage is None, "usage comes once"
            usage = chunk["usage"]
            continue
        assert usage is None, "usage is the last chunk"
        (choice,) = chunk["choices"]
        whole = choices.setdefault(
            choice["index"],
            {
                "text": "",
                "reasoning": "",
                "calls": [],
                "tokens": [],
                "logprobs": [],
                "ids": [],
                "risk": None,
                "finish": None,
            },
        )
        assert whole["finish"] is None, "I8: nothing comes after the terminal event of a choice"
        whole["text"] += choice["delta"].get("content", "")
        whole["reasoning"] += choice["delta"].get("reasoning", "")
        for call in choice["delta"].get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(whole["calls"])
                whole["calls"].append([call["function"]["name"], ""])
            whole["calls"][call["index"]][1] += call["function"]["arguments"]
        risk = choice.get("risk")
        if risk is not None:
            whole["tokens"] += risk["tokens"]
            whole["risk"] = risk if "status" in risk else whole["risk"]
        whole["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
        whole["ids"] += choice.get("token_ids", [])
        whole["finish"] = choice["finish_reason"]
    assert all(choice["finish"] is not None for choice in choices.values()), "I8"
    for choice in choices.values():
        if choice["risk"] is not None:
            choice["risk"] = {**choice["risk"], "tokens": choice.pop("tokens")}
    return [choices[i] for i in sorted(choices)], usage


def flattened(answer):
    """The same shape, from an answer that was not streamed."""
    ChatCompletion.model_validate(answer)
    choices = []
    for i, choice in enumerate(answer["choices"]):
        assert choice["index"] == i
        flat = {
            "text": choice["message"]["content"] or "",
            "reasoning": choice["message"].get("reasoning") or "",
            "calls": [
                [call["function"]["name"], call["function"]["arguments"]]
                for call in choice["message"].get("tool_calls", [])
            ],
            "logprobs": (choice["logprobs"] or {"content": []})["content"],
            "ids": choice.get("token_ids", []),
            "risk": choice.get("risk"),
            "finish": choice["finish_reason"],
        }
        choices.append(flat if flat["risk"] is not None else {**flat, "tokens": []})
    return choices, answer["usage"]


def field_of(entry):
    """The field that the offsets of a token or a span point into."""
    return entry["segment"], entry.get("tool_call_index")


def check_choice(choice):
    """I9, I10 and what a client may rely on inside one choice."""
    text, risk = choice["text"], choice["risk"]
    tokens, withheld = risk["tokens"], text == WITHHELD
    for token in tokens:
        assert token["risk"] is None or 0 <= token["risk"] <= 1
    assert sum(risk["unscored"].values()) == sum(token["risk"] is None for token in tokens)
    assert set(risk["unscored"]) <= {"not_read", "nonfinite"}
    if withheld:
        assert choice["finish"] == "content_filter"
        assert all(token["token"] == "" and token["token_id"] is None for token in tokens)
        assert choice["logprobs"] == choice["ids"] == risk["spans"] == []
        return
    fields = {("content", None): text, ("reasoning", None): choice["reasoning"]}
    fields |= {("tool_call", i): arguments for i, (_, arguments) in enumerate(choice["calls"])}
    ends = dict.fromkeys(fields, 0)
    for token in tokens:
        field, start, end = field_of(token), token["start"], token["end"]
        assert start == ends[field], "I10: no gap, no repetition"
        assert fields[field][start:end] == token["token"]
        ends[field] = end
    assert ends == {field: len(shown) for field, shown in fields.items()}
    visible = [token for token in tokens if token["token"] and token["segment"] != "reasoning"]
    scored = [token for token in visible if token["risk"] is not None]
    assert risk["status"] == (
        "unavailable" if not scored else "scored" if len(scored) == len(visible) else "partial"
    )
    assert (risk["score"] is None) == (risk["flagged"] is None) == (not scored)
    assert (risk["reason"] is None) == (risk["status"] == "scored")
    flagged = [
        t["token"] for t in tokens if t["token"] and (t["risk"] or -1) >= risk["token_threshold"]
    ]
    assert "".join(span["text"] for span in risk["spans"]) == "".join(flagged)
    for span in risk["spans"]:
        assert fields[field_of(span)][span["start"] : span["end"]] == span["text"]
        assert span["risk"] >= risk["token_threshold"] - 1e-12
    assert risk["calibrated"] == (risk["alpha"] == 1)
    if choice["logprobs"]:
        assert [entry["risk"] for entry in choice["logprobs"]] == [t["risk"] for t in tokens]
    if choice["ids"]:
        assert choice["ids"] == [token["token_id"] for token in tokens]


@pytest.mark.parametrize("position", ["read", "write"])
@MANY
@given(text=TEXTS, fields=REQUESTS)
async def test_streamed_equals_not_streamed_and_every_token_is_accounted_for(
    open_wire, position, text, fields
):
    """I1, I2, I5, I8, I9, I10, I11: a risk that is lost, doubled or moved is a wrong risk."""
    engine = FakeEngine(probes=[fake_probe(position=position)])
    async with open_wire(engine) as wire:
        answer = await wire.chat(text, **fields)
        assert answer.status_code == 200, answer.text
        choices, usage = flattened(answer.json())
        chunks = await wire.chunks(text, stream_options={"include_usage": True}, **fields)
    assert (choices, usage) == joined(chunks)
    assert len(choices) == fields.get("n", 1)
    assert usage["completion_tokens"] == sum(len(c["risk"]["tokens"]) for c in choices)
    assert {choice["risk"]["probe"] for choice in choices} == {engine.probes[0].id}
    for choice in choices:
        check_choice(choice)
        if position == "read" and "[nan" not in text:
            # Every word was read; only the end of the turn and what a stop string cut were not.
            assert choice["risk"]["status"] == "scored" or not choice["text"]
    health = engine.health()
    assert (health.running, health.waiting, health.waiting_tokens) == (0, 0, 0)


@MANY
@given(text=TEXTS, fields=REQUESTS)
async def test_monitoring_changes_no_token(open_wire, text, fields):
    """I6: risk on at alpha 1 gives the answer that risk off gives."""
    options = {} if fields["risk"] is True else fields["risk"]
    watched = {**fields, "risk": {**options, "alpha": 1.0, "policy": "flag"}}
    async with open_wire() as wire:
        with_risk, usage = flattened((await wire.chat(text, **watched)).json())
        without, same_usage = flattened((await wire.chat(text, **{**fields, "risk": False})).json())
    assert usage == same_usage
    for a, b in zip(with_risk, without, strict=True):
        assert (a["text"], a["finish"], a["ids"]) == (b["text"], b["finish"], b["ids"])
        assert b["risk"] is None
        logprobs = [{k: v for k, v in entry.items() if k != "risk"} for entry in a["logprobs"]]
        assert logprobs == b["logprobs"]


@settings(max_examples=60)
@given(
    text=TEXTS,
    fault=st.sampled_from(["fail", "die"]),
    at=st.integers(1, 6),
    n=st.integers(1, 3),
    policy=st.sampled_from(["flag", "stop", "withhold", "retry"]),
)
async def test_a_fault_is_one_error_and_never_a_short_answer(open_wire, text, fault, at, n, policy):
    """I8: an HTTP status before the first token, else one error event and no finish reason."""
    text = f"x {text}[{fault}:{at}]"
    async with open_wire() as wire:
        response = await wire.chat(text, n=n, stream=True, risk={"policy": policy})
        health = wire.engine.health()
    assert (health.running, health.waiting) == (0, 0)
    if response.status_code != 200:
        assert response.status_code == (500 if fault == "fail" else 503)
        assert set(response.json()) == {"error"}
        return
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    errors = [chunk["error"]["code"] for chunk in chunks if "error" in chunk]
    finished = {c["choices"][0]["index"] for c in chunks if "error" not in c and is_final(c)}
    if errors:
        assert errors == ["nonfinite_logits" if fault == "fail" else "engine_dead"]
        assert "error" in chunks[-1]
        assert finished < set(range(n))
    else:  # the answer was over before the fault
        assert finished == set(range(n))


def is_final(chunk):
    return bool(chunk["choices"]) and chunk["choices"][0]["finish_reason"] is not None


@settings(max_examples=40)
@given(
    stream=st.booleans(),
    after=st.integers(0, 12),
    n=st.integers(1, 3),
    policy=st.sampled_from(["flag", "withhold", "retry"]),
    slots=st.integers(1, 3),
)
async def test_a_disconnect_at_any_time_leaves_nothing_behind(
    open_wire, stream, after, n, policy, slots
):
    """I5: streamed, buffered or still in the queue; within a step the engine is free again."""
    engine = FakeEngine(max_num_seqs=slots)
    async with open_wire(engine) as wire:
        body = {
            "model": "fake",
            "messages": [{"role": "user", "content": "in 19 [loop]"}],
            "max_tokens": 4000,
            "n": n,
            "stream": stream,
            "risk": {"policy": policy},
        }
        await leave_after(wire.http._transport.app, body, passes=after)
        health = engine.health()
        assert (health.running, health.waiting, health.waiting_tokens) == (0, 0, 0)
        assert b'hneurons_aborted_requests_total{model_name="fake",reason="disconnect"} 1.0' in (
            wire.service.metrics.render()
        )
        again = await wire.chat("ok")  # all slots are free
        assert again.json()["choices"][0]["message"]["content"] == "ok"


async def leave_after(app, body, *, passes):
    """Send one request to the ASGI app and go away after so many turns of the event loop."""
    content = json.dumps(body).encode()
    messages = [{"type": "http.request", "body": content, "more_body": False}]
    gone = asyncio.Event()

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        await asyncio.sleep(0)

    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "http_version": "1.1",
        "scheme": "http",
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
        "asgi": {"version": "3.0"},
    }
    task = asyncio.create_task(app(scope, receive, send))
    await asyncio.sleep(0.01)  # the request has arrived
    for _ in range(passes):
        await asyncio.sleep(0)
    gone.set()
    async with asyncio.timeout(5):
        await task


@settings(max_examples=30)
@given(texts=st.lists(TEXTS, min_size=2, max_size=6), order=st.randoms(use_true_random=False))
async def test_neighbours_change_nothing(open_wire, texts, order):
    """I12: neither the order of arrival nor a neighbour's failure changes a byte of an answer."""
    neighbours = [*texts, "x[fail:2]"]
    order.shuffle(neighbours)
    async with open_wire(FakeEngine(max_num_seqs=3)) as wire:
        alone = {text: flattened((await wire.chat(text, risk=True)).json()) for text in texts}
        together = await asyncio.gather(*(wire.chat(text, risk=True) for text in neighbours))
    for text, response in zip(neighbours, together, strict=True):
        if text in alone:
            assert flattened(response.json()) == alone[text]
        else:
            assert response.status_code == 500


async def test_a_queue_that_is_full_refuses_with_429(open_wire):
    """The refusal comes at once and with Retry-After; nothing was started."""
    engine = FakeEngine(max_num_seqs=1, max_waiting_requests=0)
    async with open_wire(engine) as wire:
        running = engine.generate(request_that_runs(engine))
        await anext(running)
        for stream in (False, True):
            response = await wire.chat("hi", stream=stream)
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
        await running.aclose()
        assert (await wire.chat("hi")).status_code == 200


def request_that_runs(engine):
    from server.engines.base import GenerationRequest

    return GenerationRequest(request_id="r", prompt_token_ids=(97, *b"[loop]"), max_tokens=1000)


@pytest.mark.parametrize(
    ("engine", "fields", "text", "finish", "count"),
    [
        ({}, {"max_tokens": 1}, "a", "length", 1),
        ({"answer": []}, {}, "", "stop", 1),  # the end of the turn comes first
        ({"answer": [IM_END, 97]}, {}, "", "stop", 1),
        ({"answer": [0xF0, 0x9F, 0x98]}, {}, "", "stop", 4),  # ends inside a character
        ({"answer": [0xC3, 0xA9, 0xF0]}, {"max_tokens": 3}, "é", "length", 3),
        ({}, {"stop": "a"}, "", "stop", 1),  # at the first token
        ({}, {"stop": ["c", "bc"]}, "ab", "stop", 3),
        ({}, {"stop": []}, "abc", "stop", 4),
        ({"answer": [*"a😀b".encode()]}, {"stop": "😀"}, "a", "stop", 5),  # of four tokens
        ({"max_model_len": 25}, {}, "abc", "length", 3),  # the context is full
    ],
)
async def test_edges(open_wire, engine, fields, text, finish, count):
    """Each of these has crashed a server or miscounted a token somewhere."""
    async with open_wire(FakeEngine(**engine)) as wire:
        answer = (await wire.chat("abc", risk=True, **fields)).json()
        chunks = await wire.chunks("abc", risk=True, **fields)
    (choice,), usage = flattened(answer)
    assert (choice["text"], choice["finish"], usage["completion_tokens"]) == (text, finish, count)
    check_choice(choice)
    assert joined(chunks)[0] == [choice]


async def test_a_silent_stream_says_that_it_is_alive(open_wire):
    """Proxies cut connections that say nothing; a comment is what every client ignores."""
    async with open_wire(keep_alive_seconds=0.02) as wire:
        response = await wire.chat("ab[slow:70]", stream=True)
    assert response.headers["x-accel-buffering"] == "no"
    assert ": keep-alive\n\n" in response.text
    assert httpx.Response(200, text=response.text).text.endswith("data: [DONE]\n\n")
