"""Pages of other origins: the ones that are named, with the headers of OpenAI's client."""

from __future__ import annotations

from typing import Any

HEADERS = "authorization,content-type,x-stainless-lang,x-stainless-retry-count,x-stainless-timeout"


def test_named_origins_and_no_others_may_call_with_openais_client(start_server: Any) -> None:
    """Its headers are not ours to list; a space after the comma made the second origin dead."""
    with start_server("--allowed-origins", "http://one.example, http://two.example") as server:

        def preflight(origin: str) -> Any:
            return server.client.options(
                "/v1/chat/completions",
                headers={
                    "origin": origin,
                    "access-control-request-method": "POST",
                    "access-control-request-headers": HEADERS,
                },
            )

        for origin in ("http://one.example", "http://two.example"):
            assert preflight(origin).status_code == 200
            assert preflight(origin).headers["access-control-allow-origin"] == origin
        assert "access-control-allow-origin" not in preflight("http://three.example").headers
