"""A guarded server from outside: nothing without a key.

R08 every route and trick, R09 hostile keys, R11 what is absent.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

KEY = "sk-secret-9d2c"
OPEN = {"/livez", "/readyz"}
ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/risk"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/m"),
    ("GET", "/v1/probes"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/redoc"),
    ("GET", "/"),
    ("GET", "/playground/main.js"),
    ("GET", "/nothing"),
]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, start_in: Any) -> Iterator[Any]:
    with start_in(
        tmp_path_factory.mktemp("guarded"), environment={"HNEURONS_API_KEYS": f"{KEY},other"}
    ) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("is_wrong", [False, True])
def test_every_route_asks_for_a_key(guarded: Any, method: str, path: str, is_wrong: bool) -> None:
    """Prevents: a route that somebody adds and nobody guards (vLLM's /invocations)."""
    for verb in (method, "HEAD", "OPTIONS", "PUT", "BREW"):
        headers = bearer("wrong") if is_wrong else {}
        assert guarded.client.request(verb, path, headers=headers).status_code == 401


def test_the_list_of_routes_is_the_servers(guarded: Any, server: Any) -> None:
    """Prevents: a list above that lacks a new route."""
    documented = set(server.client.get("/openapi.json").json()["paths"])
    known = {path for _, path in ROUTES} | OPEN | {"/v1/models/{model}"}
    assert documented <= known
    assert "/v1/chat/completions" in documented


def test_the_line_to_type_has_a_place_for_the_key(guarded: Any, server: Any) -> None:
    """Copied as it stands it would be a 401, without a word why."""
    assert "-H 'Authorization: Bearer KEY'" in guarded.ready_line
    assert "Authorization" not in server.ready_line


def test_the_open_paths_are_open(guarded: Any) -> None:
    """Prevents: a liveness probe that needs a secret."""
    for path in OPEN:
        assert guarded.client.get(path).status_code == 200


TRICKS = [
    ("GET /v1/models HTTP/1.1", "x/?"),
    ("GET /v1/models HTTP/1.1", "livez"),
    ("GET /v1/models HTTP/1.1", "a/livez"),
    ("GET /v1/models HTTP/1.1", "a/livez?"),
    ("GET /v1/models HTTP/1.1", "a#/livez"),
    ("GET /v1/models HTTP/1.1", "127.0.0.1"),
    ("GET /v1/models HTTP/1.1", ""),
    ("GET //v1/models HTTP/1.1", "a"),
    ("GET /v1//models HTTP/1.1", "a"),
    ("GET /./v1/models HTTP/1.1", "a"),
    ("GET /livez/../v1/models HTTP/1.1", "a"),
    ("GET /livez/..;/v1/models HTTP/1.1", "a"),
    ("GET /livez%2f..%2fv1/models HTTP/1.1", "a"),
    ("GET /livez%00/v1/models HTTP/1.1", "a"),
    ("GET /%76%31/models HTTP/1.1", "a"),
    ("GET /v1%2fmodels HTTP/1.1", "a"),
    ("GET /V1/MODELS HTTP/1.1", "a"),
    ("GET /v1/models/ HTTP/1.1", "a"),
    ("GET /v1/models;/livez HTTP/1.1", "a"),
    ("GET /v1/models?/livez HTTP/1.1", "a"),
    ("GET /v1/models?x=/readyz HTTP/1.1", "a"),
    ("GET /v1/models%3f/livez HTTP/1.1", "a"),
    ("GET http://a/v1/models HTTP/1.1", "a"),
    ("GET http://a/livez HTTP/1.1", "a"),
    ("GET http://livez/v1/models HTTP/1.1", "livez"),
    ("GET /livez/ HTTP/1.1", "a"),
    ("GET /livez/v1/models HTTP/1.1", "a"),
    ("GET /metrics/livez HTTP/1.1", "a"),
    ("GET /readyz/metrics HTTP/1.1", "a"),
    ("GET /metrics HTTP/1.0", "a"),
    ("GET * HTTP/1.1", "a"),
    ("OPTIONS * HTTP/1.1", "a"),
]


@pytest.mark.parametrize("extra", ["", "x-forwarded-prefix: /livez\r\nx-original-url: /livez\r\n"])
def test_no_trick_gets_past_the_keys(
    guarded: Any, answer: Callable[..., bytes], extra: str
) -> None:
    """Prevents: CVE-2026-48746: a Host or a path that makes the guard look elsewhere."""
    for line, host in TRICKS:
        head = f"{line}\r\nhost: {host}\r\nconnection: close\r\n{extra}\r\n"
        with guarded.raw(head.encode()) as sock:
            reply = answer(sock)
        assert reply.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400")), (line, host, reply)
        assert b"list" not in reply


HOSTILE_KEYS = [
    b"",
    b"Bearer",
    b"Bearer ",
    b"Bearer  ",
    b"Basic " + KEY.encode(),
    b"bearer",
    KEY.encode(),
    b"Bearer " + KEY.encode() + b"x",
    b"Bearer " + KEY.encode()[:-1],
    b"Bearer " + KEY.encode().upper(),
    b"Bearer x," + KEY.encode(),
    b"Bearer \xc3\xa9\xff",
    b"Bearer ' OR 1=1 --",
    b"Bearer ${jndi:ldap://x}",
    b"Bearer %00",
    b"Bearer " + b"A" * 513,
    b"Bearer " + b"A" * 60_000,
    b"Digest username=x",
]


@pytest.mark.parametrize("value", HOSTILE_KEYS, ids=range(len(HOSTILE_KEYS)))
def test_a_hostile_key_is_refused(guarded: Any, answer: Callable[..., bytes], value: bytes) -> None:
    """Prevents: a 500 or an exception on the error path of the keys (LiteLLM's SQL)."""
    head = b"GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\nauthorization: "
    with guarded.raw(head + value + b"\r\n\r\n") as sock:
        assert answer(sock).startswith((b"HTTP/1.1 401", b"HTTP/1.1 400"))


@pytest.mark.parametrize("key", [KEY, "other"])
def test_a_known_key_opens_everything_that_is_there(guarded: Any, key: str) -> None:
    """Prevents: a guard that refuses everybody, which every test above would praise."""
    for path in ("/v1/models", "/v1/probes", "/version", "/metrics"):
        assert guarded.client.get(path, headers=bearer(key)).status_code == 200
    for path in ("/openapi.json", "/docs", "/redoc", "/", "/playground/main.js"):
        assert guarded.client.get(path, headers=bearer(key)).status_code == 404


def test_a_page_with_keys_is_open_and_its_api_is_not(start_server: Any) -> None:
    """Prevents: a page that cannot load because a browser sends no key for it."""
    environment = {"HNEURONS_API_KEYS": KEY}
    with start_server("--playground", environment=environment) as server:
        assert server.client.get("/").status_code == 200
        assert server.client.get("/playground/main.js").status_code == 200
        assert server.client.get("/v1/models").status_code == 401
        assert server.client.get("/metrics").status_code == 401


def test_metrics_move_to_their_own_port(start_server: Any) -> None:
    """Prevents: R11, metrics that need a key where Prometheus has none, or are open in public."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"HNEURONS_API_KEYS": KEY}
    with start_server("--metrics-port", str(port), environment=environment) as server:
        assert server.client.get("/metrics", headers=bearer(KEY)).status_code == 404
        page = httpx.get(f"http://127.0.0.1:{port}/metrics")
        assert "hneurons_engine_alive" in page.text
        for path in ("/v1/models", "/", "/openapi.json", "/livez"):
            assert httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 404
