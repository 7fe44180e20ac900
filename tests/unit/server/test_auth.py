"""API keys: who gets in, and that nothing of a key comes out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from server.auth import MAX_KEY_BYTES, ApiKeys, KeysError, hash_keys, read_key_hashes

KEY, OTHER = "sk-right", "sk-other"
PATHS = ("/livez", "/readyz", "/v1/models", "/metrics", "/")


@pytest.fixture
def client() -> httpx.AsyncClient:
    async def ok(_: object) -> PlainTextResponse:
        return PlainTextResponse("in")

    app: ASGIApp = Starlette(routes=[Route(path, ok) for path in PATHS])
    guarded = ApiKeys(app, hashes=hash_keys(f"{KEY},{OTHER}"))
    return httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://test")


@pytest.mark.parametrize("path", [p for p in PATHS if p not in ("/livez", "/readyz")])
async def test_every_path_but_the_probes_needs_a_key(client: httpx.AsyncClient, path: str) -> None:
    """Prevents: an allowlist of guarded prefixes that forgets a route (vLLM's /invocations)."""
    refused = await client.get(path)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["code"] == "invalid_api_key"
    for key in (KEY, OTHER):
        allowed = await client.get(path, headers={"authorization": f"Bearer {key}"})
        assert allowed.text == "in"


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
async def test_the_health_paths_are_open(client: httpx.AsyncClient, path: str) -> None:
    """Prevents: an orchestrator that restarts a healthy server because it has no key."""
    assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer wrong",
        b"Bearer sk-righ",
        b"Bearer sk-rightx",
        b"Bearer SK-RIGHT",
        b"Basic c2stcmlnaHQ=",
        b"sk-right",
        b"Token sk-right",
        b"Bearer Bearer sk-right",
        b"Bearer sk-right,sk-other",
        b"Bearer \xff\xfe",
        b"Bearer ' OR '1'='1",
        b"Bearer " + b"k" * 100_000,
    ],
)
async def test_a_wrong_header_is_refused(client: httpx.AsyncClient, header: bytes) -> None:
    """Prevents: a scheme, a prefix or an odd byte that passes or raises."""
    response = await client.get("/v1/models", headers=[(b"authorization", header)])
    assert response.status_code == 401


async def test_two_authorization_headers_are_refused(client: httpx.AsyncClient) -> None:
    """Prevents: a proxy that checks the first header and a server that reads the second."""
    headers = [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer x")]
    assert (await client.get("/v1/models", headers=headers)).status_code == 401


@pytest.mark.parametrize("host", ["x/?", "livez", "x/livez?", "x#/livez", "[", "a b"])
async def test_the_host_header_cannot_name_an_open_path(
    client: httpx.AsyncClient, host: str
) -> None:
    """Prevents: CVE-2026-48746, a guard that reads `request.url.path`."""
    assert (await client.get("/v1/models", headers={"host": host})).status_code == 401


async def test_a_key_of_the_longest_length_is_accepted() -> None:
    """Prevents: a limit that cuts keys off by one."""

    async def app(scope: object, receive: object, send: object) -> None:
        await PlainTextResponse("in")(scope, receive, send)  # type: ignore[arg-type]

    for length, status in ((MAX_KEY_BYTES, 200), (MAX_KEY_BYTES + 1, 401)):
        key = "k" * length
        guarded = ApiKeys(app, hashes=[hashlib.sha256(key.encode()).digest()])
        transport = httpx.ASGITransport(guarded)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            response = await client.get("/x", headers={"authorization": f"Bearer {key}"})
        assert response.status_code == status


def test_a_file_of_hashes_takes_what_sha256sum_prints(tmp_path: Path) -> None:
    """Prevents: an operator who follows the documentation and cannot log in."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    file = tmp_path / "keys"
    file.write_text(f"# team a\n\n{digest}  -\n{digest.upper()} # again\n")
    assert read_key_hashes(file) == hash_keys(f"{KEY},{KEY}")


@pytest.mark.parametrize("content", ["", "# nothing\n", "sk-secret-in-clear\n", "abc123\n"])
def test_a_bad_key_file_is_refused_without_quoting_it(tmp_path: Path, content: str) -> None:
    """Prevents: a server that runs open because its file was empty; a key in a log."""
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(KeysError) as refusal:
        read_key_hashes(file)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("keys", ["", ",", "a,", " ", "a,,b", "k" * (MAX_KEY_BYTES + 1)])
def test_empty_keys_are_refused(keys: str) -> None:
    """Prevents: `HNEURONS_API_KEYS=$UNSET` that opens the server to `Bearer `."""
    with pytest.raises(KeysError):
        hash_keys(keys)


def test_a_missing_key_file_is_refused(tmp_path: Path) -> None:
    """Prevents: a typo in the path that opens the server."""
    with pytest.raises(KeysError, match="cannot read"):
        read_key_hashes(tmp_path / "absent")
