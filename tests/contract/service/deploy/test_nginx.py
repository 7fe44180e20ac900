"""deploy/nginx/nginx.conf under Debian's nginx: streams, slow clients, limits, a lost replica."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi 42"}], "risk": True}


@pytest.fixture(scope="module")
def proxied(
    start_in: Any,
    start_nginx: Callable[..., AbstractContextManager[Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SimpleNamespace]:
    """One server behind nginx."""
    folder = tmp_path_factory.mktemp("nginx")
    with start_in(folder) as server, start_nginx(folder, [server.port]) as proxy:
        yield SimpleNamespace(server=server, proxy=proxy)


def test_answers_are_those_of_the_server(proxied: Any) -> None:
    """A proxy that changes a body or drops a header changes the contract."""
    answer = proxied.proxy.client.post(
        "/v1/chat/completions", json=BODY, headers={"x-request-id": "mine-1"}
    )
    direct = proxied.server.client.post("/v1/chat/completions", json=BODY)
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["choices"] == direct.json()["choices"]


def test_a_stream_is_not_buffered(proxied: Any) -> None:
    """Tokens that arrive all at once are no stream; nginx buffers by default."""
    body = BODY | {"stream": True, "messages": [{"role": "user", "content": "[slow:150]abcdefgh"}]}
    arrivals = []
    with proxied.proxy.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = []
        for line in response.iter_lines():
            if line.startswith("data: "):
                lines.append(line)
                arrivals.append(time.monotonic())
    assert lines[-1] == "data: [DONE]"
    assert arrivals[-1] - arrivals[0] > 0.8
    longest = max(b - a for a, b in pairwise(arrivals))
    assert longest < 0.8 * (arrivals[-1] - arrivals[0])


def test_a_client_that_leaves_ends_its_generation(proxied: Any) -> None:
    """Behind a proxy the server sees only the proxy leave: it must."""
    body = BODY | {
        "stream": True,
        "max_tokens": 3000,
        "messages": [{"role": "user", "content": "[slow:20][loop]tick"}],
    }
    before = proxied.server.metric("hneurons_aborted_requests_total")
    with proxied.proxy.client.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 30
    while proxied.server.metric("hneurons_aborted_requests_total") == before:
        assert time.monotonic() < deadline, "the generation goes on for nobody"
        time.sleep(0.1)


@pytest.mark.parametrize("headers", [{}, {"transfer-encoding": "chunked"}])
def test_a_body_beyond_the_limit_is_refused_in_our_shape(
    proxied: Any, headers: dict[str, str]
) -> None:
    """nginx would answer in HTML, and clients would fail to parse that."""
    content = b'{"model": "' + b"x" * 1_100_000 + b'"}'
    requests = proxied.server.metric("hneurons_rejected_requests_total")
    answer = proxied.proxy.client.post(
        "/v1/chat/completions",
        content=iter([content]) if headers else content,
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert proxied.server.metric("hneurons_rejected_requests_total") == requests


def test_only_what_clients_need_is_reachable(proxied: Any) -> None:
    """Metrics and the page of an inner server must not be on the street."""
    client = proxied.proxy.client
    for path in ("/metrics", "/openapi.json", "/", "/version", "/v1/../metrics", "//metrics"):
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert answer.json()["error"]["code"] == "not_found"
    assert client.get("/readyz").json() == {"status": "ready"}


def test_slow_and_huge_senders_are_closed_and_others_served(proxied: Any) -> None:
    """Headers that never end cost a worker nothing, and the server never hears of them."""
    half = proxied.proxy.raw(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-a: ")
    dribble = proxied.proxy.raw(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 1000\r\n\r\n{"
    )
    huge = proxied.proxy.raw(b"GET /livez HTTP/1.1\r\nhost: x\r\nx-a: " + b"a" * 50_000)
    assert b" 400 " in proxied.proxy.rest_of(huge)
    started = time.monotonic()
    assert proxied.proxy.client.post("/v1/chat/completions", json=BODY).status_code == 200
    assert time.monotonic() - started < 8
    assert proxied.proxy.rest_of(half) == b""
    assert b" 200 " not in proxied.proxy.rest_of(dribble)
    assert time.monotonic() - started < 25


def test_the_limit_of_connections_is_per_client(proxied: Any) -> None:
    """One client with a thousand sockets must not be everybody's outage."""
    crowd = [
        proxied.proxy.raw(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
            b"content-type: application/json\r\ncontent-length: 9\r\n\r\n{"
        )
        for _ in range(64)
    ]
    try:
        deadline = time.monotonic() + 8
        while (answer := proxied.proxy.client.get("/readyz")).status_code == 200:
            assert time.monotonic() < deadline
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "overloaded"
    finally:
        for sock in crowd:
            sock.close()


def test_without_a_replica_the_answer_is_a_503_in_our_shape(
    start_nginx: Any, tools: Any, tmp_path: Path
) -> None:
    """A 502 in HTML is nothing that an SDK retries on with our Retry-After."""
    with start_nginx(tmp_path, [tools.free_port()]) as proxy:
        answer = proxy.client.post("/v1/chat/completions", json=BODY)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.json()["error"]["code"] == "unavailable"


def test_the_log_holds_neither_text_nor_keys_nor_addresses(proxied: Any) -> None:
    """The proxy's log is kept longer than ours and read by more people."""
    proxied.proxy.client.post(
        "/v1/chat/completions?q=CANARY",
        json=BODY | {"messages": [{"role": "user", "content": "CANARY"}]},
        headers={"authorization": "Bearer CANARY", "x-request-id": "seen-1"},
    )
    log = proxied.proxy.log.read_text()
    assert "seen-1" in log
    assert "CANARY" not in log
