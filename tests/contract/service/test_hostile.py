"""Hostile requests against a real process: refused in our shape, never a 500, never an echo.

R02 bodies, R03 bounds, R04 dangerous fields, R05 sizes, R07 bytes on the wire.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

CANARY = "CANARY-7f3a"
CHAT = {"model": "m", "messages": [{"role": "user", "content": CANARY}]}
HEADERS = {"content-type": "application/json"}


def chat_with(**fields: Any) -> dict[str, Any]:
    return {**CHAT, **fields}


def assert_refused(response: httpx.Response, *, param: str | None = None) -> None:
    """4xx in OpenAI's shape, without what was sent."""
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert CANARY not in response.text
    if param is not None:
        assert error["param"] == param, error


def raw_chat(inner: str) -> bytes:
    """A chat request with `inner` spliced in as JSON text."""
    return f'{{"model":"m","messages":[{{"role":"user","content":"{CANARY}"}}],{inner}}}'.encode()


BODIES: list[bytes] = [
    b"",
    b" ",
    b"null",
    b"true",
    b"0",
    b"[]",
    b"[[]]",
    b'"CANARY-7f3a"',
    b"{",
    b"}",
    b"{}",
    b"{]",
    b'{"model"',
    b'{"model":}',
    b'{"model":"m",}',
    b"{'model': 'm'}",
    b'{"model":"m"}{"model":"m"}',
    b"\x00",
    b"\xff\xfe\xfd",
    b"\xef\xbb\xbf{}",
    json.dumps(CHAT).encode("utf-16"),
    json.dumps(CHAT).encode("utf-32"),
    json.dumps(CHAT).encode()[:-1],
    json.dumps(CHAT).encode() + b"\x00",
    b"<xml>CANARY-7f3a</xml>",
    b"model=m&messages=CANARY-7f3a",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"[" * 40 + b"]" * 40,
    raw_chat('"temperature":NaN'),
    raw_chat('"temperature":Infinity'),
    raw_chat('"temperature":-Infinity'),
    raw_chat('"temperature":1e400'),
    raw_chat('"temperature":-1e400'),
    raw_chat('"temperature":' + "9" * 400),
    raw_chat('"seed":' + "9" * 5000),
    raw_chat('"seed":' + "9" * 4000),
    raw_chat('"seed":1e30'),
    raw_chat('"seed":1.5'),
    raw_chat('"seed":true'),
    raw_chat('"risk":{"alpha":NaN}'),
    raw_chat('"risk":{"alpha":1e400}'),
    raw_chat('"risk":{"alpha":"0.5"}'),
    raw_chat('"risk":{"alpha":true}'),
    raw_chat('"risk":{"threshold":NaN}'),
    raw_chat('"risk":{"probe":null}'),
    raw_chat('"risk":[]'),
    raw_chat('"risk":"true"'),
    raw_chat('"risk":1'),
    raw_chat('"risk":{"CANARY-7f3a":1}').replace(b'"CANARY-7f3a":1', b'"x CANARY-7f3a":1'),
    raw_chat('"user":"\\ud800"'),
    raw_chat('"user":"\\udfff\\ud800"'),
    raw_chat('"stop":["\\ud83d"]'),
    raw_chat('"model":"m"'),
    raw_chat('"n":1,"n":2'),
    raw_chat('"metadata":{"a":"1","a":"2"}'),
    raw_chat('"metadata":{"a":{"b":{}}}'),
    raw_chat('"metadata":' + '{"a":' * 33 + "1" + "}" * 33),
    raw_chat('"logit_bias":{"-1":1}'),
    raw_chat('"logit_bias":{"1e3":1}'),
    raw_chat('"logit_bias":{"999999999":1}'),
    raw_chat('"logit_bias":{"5":101}'),
    raw_chat('"logit_bias":{"5":null}'),
    raw_chat('"logit_bias":[5]'),
    raw_chat('"stream":"yes"'),
    raw_chat('"stream":1'),
    raw_chat('"stream_options":{"include_usage":true}'),
    raw_chat('"stop":[1]'),
    raw_chat('"stop":[""]'),
    raw_chat('"stop":{"a":1}'),
    json.dumps({"model": "m", "messages": [1] * 100_000}).encode(),
    json.dumps({"model": "m", "messages": [{}] * 100_000}).encode(),
    b'{"model":"m","messages":[' + b"{}," * 300_000 + b"{}]}",
    json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}] * 1025}).encode(),
    json.dumps({"model": "m", "messages": []}).encode(),
    json.dumps({"model": "m", "messages": {"role": "user"}}).encode(),
    json.dumps({"model": "m", "messages": [{"role": CANARY, "content": ""}]}).encode(),
    json.dumps({"model": "m", "messages": [{"role": "user"}]}).encode(),
    json.dumps({"model": "m", "messages": [{"role": "user", "content": None}]}).encode(),
    json.dumps({"model": "m", "messages": [{"role": "user", "content": [{"type": "x"}]}]}).encode(),
    json.dumps({"model": CANARY, "messages": CHAT["messages"]}).encode(),
    json.dumps({"model": ["m"], "messages": CHAT["messages"]}).encode(),
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/risk"])
def test_a_hostile_body_is_refused(server: Any, path: str, body: bytes) -> None:
    """Prevents: F3, a 500 or an echo for NaN, surrogates, depth, wrong types."""
    assert_refused(server.client.post(path, content=body, headers=HEADERS))


def test_there_are_enough_hostile_bodies() -> None:
    """Prevents: a list that shrinks; R02 asks for 60."""
    assert len(set(BODIES)) >= 60


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16"]
)
def test_a_body_of_another_type_is_refused(server: Any, kind: str) -> None:
    """Prevents: a form on a foreign page that uses the server of whoever looks at it."""
    content = json.dumps(CHAT).encode()
    assert_refused(
        server.client.post("/v1/chat/completions", content=content, headers={"content-type": kind})
    )


def test_the_server_answers_others_while_it_refuses(server: Any) -> None:
    """Prevents: F14, one body that keeps the event loop busy for seconds."""
    worst = 0.0
    is_over = threading.Event()

    def look() -> None:
        nonlocal worst
        with httpx.Client(base_url=server.client.base_url, timeout=30) as client:
            while not is_over.is_set():
                started = time.monotonic()
                assert client.get("/livez").status_code == 200
                worst = max(worst, time.monotonic() - started)

    observer = threading.Thread(target=look)
    observer.start()
    try:
        for body in (b"[" * 1_000_000, b'{"a":[' + b"1," * 500_000 + b"1]}", BODIES[-12]):
            server.client.post("/v1/chat/completions", content=body, headers=HEADERS)
    finally:
        is_over.set()
        observer.join()
    assert worst < 1.0  # 0.25 s on an idle machine; tests share theirs


# --- R03: every bound, one step outside -----------------------------------------------------

NUMBERS: dict[str, tuple[list[Any], list[Any]]] = {
    # field: values at the bounds, values just outside
    "n": ([1, 8], [0, 9]),
    "temperature": ([0, 2, 0.0, 2.0], [-0.001, 2.001]),
    "top_p": ([0.001, 1], [0, 1.001]),
    "top_k": ([-1, 0, 1, 2**31 - 1], [-2]),
    "min_p": ([0, 1], [-0.001, 1.001]),
    "seed": ([0, 2**62], [-1, 2**62 + 1]),
    "max_tokens": ([1, 8], [0, -1]),
    "max_completion_tokens": ([1, 8], [0, -1]),
    "presence_penalty": ([-2, 2], [-2.001, 2.001]),
    "frequency_penalty": ([-2, 2], [-2.001, 2.001]),
    "repetition_penalty": ([0.001, 2], [0, 2.001]),
    "risk.alpha": ([0, 3, 0.5], [-0.001, 3.001]),
    "risk.threshold": ([0, 1], [-0.001, 1.001]),
    "risk.contributors": ([0, 10], [-1, 11]),
}
NEVER_A_NUMBER = ["1", True, [], {}, [1], 2**63, -(2**63), 1e300]


def with_field(field: str, value: Any) -> dict[str, Any]:
    outer, _, inner = field.partition(".")
    body = chat_with(**{outer: {inner: value} if inner else value})
    if field != "max_completion_tokens" and field != "max_tokens":
        body["max_tokens"] = 8
    return body


def outside() -> Iterator[tuple[str, Any]]:
    for field, (_, bad) in NUMBERS.items():
        for value in [*bad, *NEVER_A_NUMBER, *([None] if field.startswith("risk.") else [])]:
            if field != "risk.contributors" or value is not None:
                yield field, value
    yield "risk.contributors", None


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, (good, _) in NUMBERS.items() for v in good]
)
def test_a_value_at_the_bound_is_taken(server: Any, field: str, value: Any) -> None:
    """Prevents: a bound that is off by one, and a test of refusals that refuses everything."""
    response = server.client.post("/v1/chat/completions", json=with_field(field, value))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("field", "value"), list(outside()))
def test_a_value_outside_is_refused_by_name(server: Any, field: str, value: Any) -> None:
    """Prevents: CVE-2026-34756 and its kin: a count, an index or an alpha without a bound."""
    response = server.client.post("/v1/chat/completions", json=with_field(field, value))
    # An integer beyond 64 bits is refused before the schema, which alone knows the name.
    assert_refused(response, param=None if value == 2**63 else field)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat_with(top_logprobs=21, logprobs=True), "top_logprobs"),
        (chat_with(top_logprobs=-1, logprobs=True), "top_logprobs"),
        (chat_with(top_logprobs=1), "top_logprobs"),
        (chat_with(stop=["a"] * 5), "stop"),
        (chat_with(stop="x" * 257), "stop"),
        (chat_with(risk={"nope": 1}), "risk.nope"),
        (chat_with(risk={"policy": "nope"}), "risk.policy"),
        (chat_with(risk={"tokens": 1}), "risk.tokens"),
        (chat_with(risk={"tokens": None}), "risk.tokens"),
        (chat_with(risk={"probe": "x" * 513}), "risk.probe"),
        (chat_with(risk={"probe": 1}), "risk.probe"),
        (chat_with(max_tokens=100_000_000), None),
        (chat_with(n=8, max_tokens=2**31 - 1), None),
    ],
)
def test_a_wrong_value_is_refused_by_name(server: Any, body: Any, param: str | None) -> None:
    """Prevents: a refusal that does not tell the client which field to repair."""
    assert_refused(server.client.post("/v1/chat/completions", json=body), param=param)


# --- R04: fields that are dangerous or not built --------------------------------------------

DANGEROUS = [
    "chat_template", "chat_template_kwargs", "documents", "prompt_embeds", "prompt_logprobs",
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "cache_salt", "priority",
    "logits_processors", "stop_token_ids", "bad_words", "vllm_xargs", "best_of",
    "mm_processor_kwargs", "tools", "tool_choice", "functions", "function_call", "reasoning",
    "reasoning_effort", "structured_outputs", "truncate_prompt_tokens", "allowed_token_ids",
    "min_tokens", "suffix", "include_stop_str_in_output", "skip_special_tokens",
    "spaces_between_special_tokens", "add_generation_prompt", "continue_final_message",
    "add_special_tokens", "kv_transfer_params", "modalities", "audio", "prediction",
    "web_search_options", "parallel_tool_calls", "extra_body", "__proto__", "constructor",
]  # fmt: skip


@pytest.mark.parametrize("field", DANGEROUS)
def test_a_dangerous_field_is_refused_by_name(server: Any, field: str) -> None:
    """Prevents: a template, a regex or a tensor of a client that is silently used or ignored."""
    body = chat_with(**{field: "{{ CANARY-7f3a }}"})
    assert_refused(server.client.post("/v1/chat/completions", json=body), param=field)


def test_only_text_format_is_taken(server: Any) -> None:
    """Prevents: free text where the client was promised JSON."""
    body = chat_with(response_format={"type": "json_object"})
    assert_refused(server.client.post("/v1/chat/completions", json=body))
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]
    body = chat_with(messages=[{"role": "user", "content": image}])
    assert_refused(server.client.post("/v1/chat/completions", json=body))


# --- R05: sizes -------------------------------------------------------------------------------

HUGE = 100 * 1024 * 1024


def huge_chunks(size: int = HUGE) -> Iterator[bytes]:
    piece = b"x" * 65_536
    for _ in range(size // len(piece)):
        yield piece


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_huge_body_is_refused_in_little_memory(server: Any, is_chunked: bool) -> None:
    """Prevents: F7, a 300 MB body that becomes 1.25 GB."""
    before = server.memory_mib()
    headers = dict(HEADERS) if is_chunked else {**HEADERS, "content-length": str(HUGE)}
    peak = before
    is_over = threading.Event()

    def look() -> None:
        nonlocal peak
        while not is_over.wait(0.05):
            peak = max(peak, server.memory_mib())

    def attempt(_: int) -> int | None:
        """The status; None for a reset, which is a refusal too."""
        try:
            response = httpx.post(
                f"{server.client.base_url}/v1/chat/completions",
                content=huge_chunks(),
                headers=headers,
                timeout=120,
            )
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            return None
        return response.status_code

    observer = threading.Thread(target=look)
    observer.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            statuses = list(pool.map(attempt, range(4)))
    finally:
        is_over.set()
        observer.join()
    assert set(statuses) <= {413, None}
    assert 413 in statuses
    assert peak - before < 32
    assert server.chat().status_code == 200


def test_a_body_at_the_limit_is_read(server: Any) -> None:
    """Prevents: a limit that is off by one: the refusal must be the context's, not the size's."""
    frame = json.dumps(chat_with(messages=[{"role": "user", "content": ""}])).encode()
    for size, status in ((1_048_576, 400), (1_048_577, 413)):
        body = frame.replace(b'"content": ""', b'"content": "%s"' % (b"x" * (size - len(frame))))
        assert len(body) == size
        response = server.client.post("/v1/chat/completions", content=body, headers=HEADERS)
        assert response.status_code == status, response.text


@pytest.mark.parametrize("size", [70_000, 2_000_000, 30_000_000])
@pytest.mark.parametrize("is_target", [False, True])
def test_huge_headers_are_refused(
    server: Any, answer: Callable[..., bytes], size: int, is_target: bool
) -> None:
    """Prevents: F4, a server that takes 400 MB of headers."""
    before, started = server.memory_mib(), time.monotonic()
    filler = b"x" * size
    head = b"GET /" + filler if is_target else b"GET /livez HTTP/1.1\r\nhost: a\r\nx-a: " + filler
    with server.raw() as sock:
        try:
            sock.sendall(head)
            reply = answer(sock)
        except (ConnectionResetError, BrokenPipeError):
            reply = b""
    assert reply == b"" or reply.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    if reply:
        assert b'"error"' in reply
    assert time.monotonic() - started < 8  # the limit, not the deadline, closed it
    assert server.memory_mib() - before < 32


# --- R05, R30: deadlines ----------------------------------------------------------------------


HALF_SENT = [
    b"",
    b"GET /livez HT",
    b"GET /livez HTTP/1.1\r\nhost: a\r\nx-a: b",
    b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\nGET /livez HTTP/1.1\r\nhost",
    b"POST /v1/risk HTTP/1.1\r\nhost: a\r\ncontent-length: 50\r\n\r\n{",
    b"POST /v1/risk HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{",
    b"POST /v1/risk HTTP/1.1\r\nhost: a\r\ncontent-length: 5000000\r\n\r\n{",
]


def test_a_half_sent_request_is_closed(server: Any, answer: Callable[..., bytes]) -> None:
    """Prevents: F5, sockets that stay open for ever at no cost to the attacker."""

    def seconds_open(sent: bytes) -> float:
        started = time.monotonic()
        with server.raw(sent) as sock:
            answer(sock)  # a timeout after 30 s is the failure
        return time.monotonic() - started

    with ThreadPoolExecutor(len(HALF_SENT)) as pool:
        waited = list(pool.map(seconds_open, HALF_SENT))
    assert all(5 < seconds < 20 for seconds in waited), waited


def test_a_dripping_header_is_closed(server: Any) -> None:
    """Prevents: slow loris: a deadline that every byte extends."""
    started = time.monotonic()
    with server.raw(b"GET /livez HTTP/1.1\r\nhost: a\r\nx-a: ") as sock:
        sock.settimeout(0.5)
        while time.monotonic() - started < 25:
            try:
                sock.sendall(b"x")
                if sock.recv(100) == b"":
                    break
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                break
    assert time.monotonic() - started < 20


# --- R07: bytes on the wire -------------------------------------------------------------------

PIECES = [
    b"GET ", b"POST ", b"/v1/chat/completions", b"/", b" HTTP/1.1", b" HTTP/9.9", b" HTTP/0.9",
    b"\r\n", b"\n", b"\r", b"\0", b"host: a", b"content-length: 5", b"content-length: -1",
    b"content-length: 99999999999999999999", b"content-length: 5, 6", b"content-length: +5",
    b"transfer-encoding: chunked", b"transfer-encoding: gzip, chunked", b"5\r\nhello\r\n0\r\n\r\n",
    b"fffffffffffffffff\r\n", b"expect: 100-continue", b"upgrade: websocket",
    b"connection: upgrade", b"connection: close", b" : ", b"\xff", b"{", b"}", b"\xc3\x28",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00", b"OPTIONS * HTTP/1.1",
]  # fmt: skip


def test_no_bytes_end_the_process(server: Any) -> None:
    """Prevents: R07, a parser exception that kills the server or the next good request."""
    chance = random.Random(7)
    for _ in range(1500):
        if chance.random() < 0.3:
            data = chance.randbytes(chance.randrange(1, 200))
        else:
            data = b"".join(chance.choices(PIECES, k=chance.randrange(1, 12)))
        with server.raw() as sock:
            try:
                sock.sendall(data)
                if chance.random() < 0.5:
                    sock.shutdown(1)
                sock.settimeout(0.002)
                sock.recv(1000)
            except OSError:
                pass
    assert server.chat().status_code == 200
    assert server.process.poll() is None


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost : a\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost: a\r\nx: a\x00b\r\n\r\n",
        b"POST /v1/risk HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"POST /v1/risk HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\nhello",
        b"POST /v1/risk HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\nhello",
        b"POST /v1/risk HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n"
        b"connection: close\r\n\r\n0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
def test_malformed_http_is_a_400(
    server: Any, answer: Callable[..., bytes], request_bytes: bytes
) -> None:
    """Prevents: request smuggling past a proxy that reads the same bytes otherwise."""
    with server.raw(request_bytes) as sock:
        reply = answer(sock)
    assert reply.startswith((b"HTTP/1.1 400", b"HTTP/1.1 501"))
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "OPTIONS", "X"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/", "/nothing", "/%ff"])
def test_a_wrong_method_or_path_is_refused(server: Any, method: str, path: str) -> None:
    """Prevents: a method that reaches a handler, or an error page that is not ours."""
    response = server.client.request(method, path)
    assert response.status_code in (404, 405)
    assert_refused(response)


def test_no_origin_is_allowed(server: Any) -> None:
    """Prevents: any web page that talks to the local server of whoever looks at it."""
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for response in (
        server.client.options("/v1/chat/completions", headers=headers),
        server.client.get("/v1/models", headers=headers),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]
