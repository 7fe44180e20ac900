"""The outermost layer: ids, headers, one line per request, the last resort."""

from __future__ import annotations

import logging

import httpx
import pytest
from fastapi import FastAPI, Request

from server.edge import Edge
from server.metrics import Metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(model_name="m")


@pytest.fixture
def client(metrics: Metrics) -> httpx.AsyncClient:
    api = FastAPI()

    @api.get("/v1/items/{name}")
    async def item(name: str, request: Request) -> dict[str, str]:
        request.state.record["finish_reason"] = "stop"
        return {"id": request.state.request_id}

    @api.get("/boom")
    async def boom() -> None:
        raise ValueError("canary-prompt")

    transport = httpx.ASGITransport(Edge(api, metrics=metrics))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.parametrize("sent", ["a", "A.b_c-9", "x" * 64])
async def test_a_plain_request_id_is_kept(client: httpx.AsyncClient, sent: str) -> None:
    """Prevents: a trace that ends at our door."""
    response = await client.get("/v1/items/a", headers={"x-request-id": sent})
    assert response.headers["x-request-id"] == response.json()["id"] == sent


@pytest.mark.parametrize(
    "sent", ["", "x" * 65, "a b", "a\tb", "<script>", "a\u00e9", "a;b", "../x"]
)
async def test_any_other_request_id_is_replaced(client: httpx.AsyncClient, sent: str) -> None:
    """Prevents: header and log injection through an id that is echoed."""
    response = await client.get("/v1/items/a", headers=[(b"x-request-id", sent.encode())])
    assert response.headers["x-request-id"] == response.json()["id"]
    assert len(response.json()["id"]) == 32


async def test_two_request_ids_are_replaced(client: httpx.AsyncClient) -> None:
    """Prevents: two systems that log the same request under two names."""
    response = await client.get(
        "/v1/items/a", headers=[("x-request-id", "a"), ("x-request-id", "b")]
    )
    assert response.json()["id"] not in ("a", "b")


async def test_every_answer_has_the_security_headers(client: httpx.AsyncClient) -> None:
    """Prevents: an error page that a browser renders, or that a proxy stores."""
    for path in ("/v1/items/a", "/nothing", "/boom"):
        headers = (await client.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["x-request-id"]


async def test_one_line_per_request_without_the_clients_words(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents: two lines, none, or one that holds the path that was asked for."""
    caplog.set_level(logging.INFO, "server.edge")
    await client.get("/v1/items/canary?x=canary", headers={"x-request-id": "one"})
    await client.get("/canary", headers={"x-request-id": "two"})
    lines = [vars(record) for record in caplog.records]
    assert [(x["request_id"], x["route"], x["status"]) for x in lines] == [
        ("one", "/v1/items/{name}", 200),
        ("two", "unknown", 404),
    ]
    assert lines[0]["finish_reason"] == "stop"
    assert all(line["seconds"] >= 0 for line in lines)
    assert "canary" not in str(lines)


async def test_an_unhandled_exception_is_a_500_without_detail(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, metrics: Metrics
) -> None:
    """Prevents: a stack trace or a prompt in an error body, and a failure that nobody counts."""
    response = await client.get("/boom")
    assert response.status_code == 500
    assert "canary" not in response.text
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR] == ["unhandled"]
    assert 'hneurons_rejected_requests_total{model_name="m",reason="failed"} 1.0' in (
        metrics.render().decode()
    )


async def test_refusals_are_counted_by_closed_words(
    client: httpx.AsyncClient, metrics: Metrics
) -> None:
    """Prevents: R40, a path or a method of a client that becomes a label."""
    await client.get("/canary")
    await client.post("/v1/items/a")
    page = metrics.render().decode()
    assert 'reason="not_found"} 1.0' in page
    assert 'reason="method_not_allowed"} 1.0' in page
    assert "canary" not in page
