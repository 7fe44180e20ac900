"""Every exception in OpenAI's shape; validation names the client's own path and never a value."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from probes.errors import HNeuronsError
from server.api.errors import APIError, install_error_handlers, to_api_error
from server.engines.base import EngineDeadError, EngineOverloadedError, RequestFailedError


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Options(Strict):
    alpha: Annotated[float, Field(ge=0, le=3)] = 1.0


class Text(Strict):
    type: Literal["text"]
    text: str


class Image(Strict):
    type: Literal["image"]
    url: str


class Body(Strict):
    items: list[str | int]
    risk: bool | Options = False
    part: Annotated[Text | Image, Field(discriminator="type")] | None = None


@pytest.fixture
def client() -> httpx.AsyncClient:
    app = FastAPI()
    install_error_handlers(app)

    @app.post("/x")
    async def take(body: Body) -> None: ...

    @app.post("/{kind}/boom")
    async def boom(kind: str) -> None:
        raise ValueError("canary")

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "items", "missing_required_parameter"),
        ({"items": [], "canary": 1}, "canary", "unknown_parameter"),
        ({"items": [], "risk": {"alpha": 4}}, "risk.alpha", "invalid_value"),
        ({"items": [], "risk": {"alpha": True}}, "risk.alpha", "invalid_value"),
        ({"items": [], "risk": {"nope": 4}}, "risk.nope", "unknown_parameter"),
        ({"items": [], "risk": "canary"}, "risk", "invalid_value"),
        ({"items": ["a", [1]]}, "items.1", "invalid_value"),
        ({"items": [], "part": {"type": "canary-tag"}}, "part", "invalid_value"),
        ({"items": [], "part": {"type": "text"}}, "part.text", "missing_required_parameter"),
        ({"items": [], "a b canary": 1}, None, "unknown_parameter"),
        ({"items": [], "c" * 65: 1}, None, "unknown_parameter"),
        ([], None, "invalid_value"),
        (None, None, "missing_required_parameter"),
    ],
)
async def test_a_bad_body_is_named_by_the_clients_path(
    client: httpx.AsyncClient, body: Any, param: str | None, code: str
) -> None:
    """Prevents: `param` with pydantic's union labels in it, and F3's echo of the input."""
    response = await client.post("/x", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    if param != "canary":
        assert "canary" not in response.text


async def test_nothing_of_an_unexpected_exception_comes_out(client: httpx.AsyncClient) -> None:
    """Prevents: a stack trace or a value in a 500."""
    response = await client.post("/a/boom")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "canary" not in response.text


async def test_routes_and_methods_are_refused_in_our_shape(client: httpx.AsyncClient) -> None:
    """Prevents: `{"detail": "Not Found"}`, and a 405 without Allow."""
    missing = await client.get("/canary")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert "canary" not in missing.text
    wrong = await client.get("/x")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("error", "status", "code", "kind", "retries"),
    [
        (EngineOverloadedError("9 wait"), 429, "overloaded", "rate_limit_error", True),
        (EngineDeadError("cuda"), 503, "engine_dead", "server_error", True),
        (RequestFailedError("slow_client", "x"), 500, "slow_client", "server_error", False),
        (HNeuronsError("x"), 500, "monitor_failed", "server_error", False),
        (KeyError("x"), 500, "internal_error", "server_error", False),
        (APIError(404, "no", code="c"), 404, "c", "invalid_request_error", False),
    ],
)
def test_every_exception_has_one_translation(
    error: Exception, status: int, code: str, kind: str, retries: bool
) -> None:
    """Prevents: a stream and a body that tell one failure differently, or no Retry-After."""
    told = to_api_error(error)
    assert (told.status, told.code) == (status, code)
    assert told.body()["error"]["type"] == kind
    assert ("retry-after" in told.headers) is retries
