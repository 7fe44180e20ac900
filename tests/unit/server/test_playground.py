"""The playground's files over HTTP, without a browser."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from server.api.playground import FILES, playground_paths, playground_routes


@pytest.fixture
def client() -> httpx.AsyncClient:
    app = Starlette(routes=list(playground_routes()))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")


def test_every_packaged_file_is_served_and_nothing_else_lies_in_the_folder(
    repository: Path,
) -> None:
    """A module that is not on the list would be a 404 for everybody but its author."""
    folder = repository / "server" / "playground"
    assert {path.name for path in folder.iterdir()} == set(FILES)


async def test_each_file_has_its_type_and_the_guarding_headers(client: httpx.AsyncClient) -> None:
    """A module with a wrong type does not run under nosniff; a page without CSP has one lock."""
    for path, media_type in zip(playground_paths(), FILES.values(), strict=True):
        response = await client.get(path)
        assert response.status_code == 200, path
        assert response.headers["content-type"] == media_type
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-cache"
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert "http" not in policy


async def test_an_unchanged_file_is_304_and_another_tag_gets_the_file(
    client: httpx.AsyncClient,
) -> None:
    """After an upgrade a browser must not go on with the old page."""
    first = await client.get("/playground/main.js")
    again = await client.get(
        "/playground/main.js", headers={"if-none-match": first.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"]
    other = await client.get("/playground/main.js", headers={"if-none-match": '"old"'})
    assert other.content == first.content


@pytest.mark.parametrize(
    "path",
    [
        "/playground",
        "/playground/",
        "/playground/index.html",
        "/playground/../api/errors.py",
        "/playground/%2e%2e/api/errors.py",
        "/playground/main.js%00",
        "/playground/.",
    ],
)
async def test_what_is_not_on_the_list_does_not_exist(client: httpx.AsyncClient, path: str) -> None:
    """File serving has a history of escapes; a fixed list has no path to escape from."""
    response = await client.get(path)
    assert response.status_code in {404, 400}


async def test_only_reading_is_possible(client: httpx.AsyncClient) -> None:
    """No route of the page takes a form or a file."""
    assert (await client.post("/")).status_code == 405
    assert (await client.head("/")).status_code == 200


def test_the_files_name_no_foreign_address_and_parse_no_html(repository: Path) -> None:
    """The page works offline, and model output must never be read as HTML."""
    for path in (repository / "server" / "playground").iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", text), path.name
        parsers = r"(inner|outer)HTML|AdjacentHTML|document\.write|\beval\(|new Function|DOMParser"
        assert not re.search(parsers, text), path.name
        assert not re.search(r"localStorage|sessionStorage|indexedDB|document\.cookie", text)
