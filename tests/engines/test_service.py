"""What an operator gets: load, limits, metrics, signals; the same from both engines, or said so."""

from __future__ import annotations

import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest

from server.api.listings import ModelList, ProbeList
from tests.running import OpenStream, Watch, ending, wait_until

SEA = "Tell me about the sea."
FOREVER = {"max_tokens": 900, "ignore_eos": True, "risk": True}
WORD = 1000  # a token with text
AT_ONCE = 32  # requests that decode and that wait, see conftest.py
SECONDS = 60.0  # for what takes a second on an idle machine
NOISE = 0.05  # of a risk in bfloat16, when a token is read beside others

# vLLM's probe is compiled into its graph: replicas are rolled instead.
RELOAD = {"transformers": "loaded", "vllm": "rejected"}


def said(content, role="user"):
    return {"role": role, "content": content}


def is_idle(server):
    return server.metric("hneurons_requests_running") == 0


def greet(server):
    """The server still works."""
    answer = server.chat("Say hello.", max_tokens=4, risk=True)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["risk"]["status"] == "scored"


def test_it_is_ready_and_says_what_it_serves(server, context):
    """What load balancers, clients and dashboards ask first."""
    get = server.client.get
    assert [get(path).status_code for path in ("/readyz", "/livez")] == [200, 200]
    models = get("/v1/models").json()
    ModelList.model_validate(models)
    assert [model["id"] for model in models["data"]] == ["SmolLM2-135M-Instruct", "demo"]
    assert {model["max_model_len"] for model in models["data"]} == {context}
    probes = get("/v1/probes").json()
    ProbeList.model_validate(probes)
    assert [probe["name"] for probe in probes["data"]] == ["smollm2-135m-instruct"]


REFUSED = [
    ({"risk": {"alpha": 4}}, 400, "risk.alpha", "invalid_value"),
    ({"risk": {"probe": "none"}}, 404, "risk.probe", "probe_not_found"),
    ({"risk": {"layer": 4}}, 400, "risk.layer", "unknown_parameter"),
    ({"model": "gpt-9"}, 404, "model", "model_not_found"),
    ({"temperature": 3}, 400, "temperature", "invalid_value"),
    ({"logit_bias": {"99999999": 1}}, 400, "logit_bias", "invalid_value"),
    ({"max_tokens": 1024}, 400, "max_tokens", "context_length_exceeded"),
    ({"messages": [said("sea " * 2000)]}, 400, "messages", "context_length_exceeded"),
    ({"messages": [said("hi", "robot")]}, 400, "messages.0.role", "invalid_value"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "status", "param", "code"), REFUSED, ids=[param for _, _, param, _ in REFUSED]
)
def test_refusals_are_the_clients_own_exceptions(client, fields, status, param, code, stream):
    """`except openai.BadRequestError as e: e.param` is how applications handle them."""
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(
            model="demo", messages=[said(SEA)], stream=stream, extra_body=fields
        )
    error = refused.value
    assert (error.status_code, error.param, error.code) == (status, param, code)
    assert error.type == "invalid_request_error"


def test_the_context_can_be_filled_to_its_last_place(server, context):
    """One token more than fits has crashed engines; one less than fits is a broken promise."""
    body = {"model": "demo", "prompt": [WORD] * (context - 1), "max_tokens": 1, "risk": True}
    full = server.client.post("/v1/completions", json={**body, "ignore_eos": True})
    assert full.status_code == 200, full.text
    (token,) = full.json()["choices"][0]["risk"]["tokens"]
    assert 0 <= token["risk"] <= 1
    scored = {"prompt_token_ids": [WORD], "token_ids": [WORD] * (context - 1)}
    given = server.client.post("/v1/risk", json=scored)
    assert given.json()["risk"]["status"] == "scored"
    assert given.json()["usage"]["scored_tokens"] == context - 1
    for path, change in (
        ("/v1/completions", {**body, "max_tokens": 2}),
        ("/v1/risk", {**scored, "prompt_token_ids": [WORD, WORD]}),
    ):
        refused = server.client.post(path, json=change)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_many_at_once_are_each_as_alone(server):
    """Misattributed rows show as another request's risk."""
    names = ("France", "Peru", "Japan", "Kenya")
    alphas = (1, 1, 0, 1)

    def ask(name, alpha):
        risk = {"alpha": alpha}
        answer = server.chat(
            f"Name the capital of {name}.", temperature=0, max_tokens=12, risk=risk
        )
        return answer.json()["choices"][0]["risk"]["tokens"]

    alone = [ask(*one) for one in zip(names, alphas, strict=True)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, names * 4, alphas * 4))
    for expected, found in zip(alone * 4, together, strict=True):
        for one, other in zip(expected, found, strict=False):
            if one["token_id"] != other["token_id"]:
                break  # two nearly equal logits: from here on the texts differ
            assert one["risk"] == pytest.approx(other["risk"], abs=NOISE)


def test_metrics_count_what_happened(server):
    """Dashboards and alerts stand on these names, whichever engine they watch."""
    risk = {"policy": "retry", "threshold": 0}
    counted = {
        "requests_total": 1,
        "failed_requests_total": 0,
        "choices_total": 1,
        "generation_tokens_total": 10,  # of both attempts
        "scored_tokens_total": 10,
        "monitored_responses_total": 2,
        "flagged_responses_total": 2,
        "suppressed_responses_total": 1,
        "policy_actions_total": 1,
        "request_duration_seconds_count": 1,
        "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 9,
    }
    before = {name: server.metric(f"hneurons_{name}") for name in counted}
    seconds = server.metric("hneurons_forward_seconds_total")
    answer = server.chat("Name a river.", temperature=0, max_tokens=5, ignore_eos=True, risk=risk)
    assert answer.status_code == 200, answer.text
    after = {name: server.metric(f"hneurons_{name}") for name in counted}
    assert {name: after[name] - before[name] for name in counted} == counted
    assert server.metric("hneurons_forward_seconds_total") > seconds
    assert server.metric("hneurons_engine_alive") == 1


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_free_their_places(server, stream):
    """I5 over real sockets: a generation that goes on for nobody."""
    before = server.metric("hneurons_aborted_requests_total")
    sockets = [server.raw(server.chat_bytes(SEA, **FOREVER, stream=stream)) for _ in range(4)]
    wait_until(lambda: server.metric("hneurons_requests_running") == 4, SECONDS)
    for sock in sockets:
        sock.close()
    wait_until(lambda: is_idle(server), 10)
    wait_until(lambda: server.metric("hneurons_aborted_requests_total") == before + 4, 10)


def test_what_the_queue_cannot_hold_is_a_429(server):
    """An unbounded queue is memory, and clients that wait for nothing."""
    sockets = [server.raw(server.chat_bytes(SEA, **FOREVER, stream=True)) for _ in range(AT_ONCE)]
    wait_until(lambda: server.metric("hneurons_requests_running") == AT_ONCE / 2, SECONDS)
    wait_until(lambda: server.metric("hneurons_requests_waiting") == AT_ONCE / 2, SECONDS)
    for stream in (True, False):
        refused = server.chat(SEA, **FOREVER, stream=stream)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) > 0
    assert server.client.get("/readyz").status_code == 200
    for sock in sockets:
        sock.close()
    wait_until(lambda: is_idle(server), SECONDS)
    greet(server)


def test_probes_are_read_again_or_it_is_said_why_not(server, engine):
    """SIGHUP: answers go on in either case."""
    before = server.metric("hneurons_probe_reloads_total")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.metric("hneurons_probe_reloads_total") == before + 1, SECONDS)
    page = server.client.get("/metrics").text
    assert re.search(rf'^hneurons_probe_reloads_total.*"{RELOAD[engine]}"}} 1', page, re.MULTILINE)
    greet(server)


def test_sigterm_ends_every_stream_and_leaves_no_process(server):
    """Last, for it ends the server: F15, streams that are cut, and processes that stay."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    streams = [OpenStream(server, SEA, **FOREVER) for _ in range(16)]
    watch = Watch(server)
    server.process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    assert [ending(stream.finished()) for stream in streams] == ["shutdown"] * 16
    assert time.monotonic() - told < 1 + 5  # the drain timeout, and what is promised
    assert 503 in watch.over()
    assert server.wait(SECONDS) == 0
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
