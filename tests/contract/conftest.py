"""A whole server over the fake engine: in process, or on a real port for real clients."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
import uvicorn
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from server.app import create_app
from server.engines.fake import FakeEngine
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from server.service import Service


def make_fake_service(engine: FakeEngine, **settings: Any) -> Service:
    values: dict[str, Any] = {
        "engine": engine,
        "metrics": Metrics(model_name="fake", health=engine.health),
        "served_names": ("fake", "other-name"),
        "created": 1_700_000_000,
    }
    return Service(**{**values, **settings})


def make_fake_app(service: Service) -> Any:
    lifecycle = Lifecycle(health=service.engine.health, heartbeat=60)
    lifecycle.begin_serving()
    return create_app(service, lifecycle).asgi


@dataclass(frozen=True)
class Wire:
    """A client of an app in this process, and what is behind the app."""

    http: httpx.AsyncClient
    engine: FakeEngine
    service: Service

    async def chat(self, text: str, **fields: Any) -> httpx.Response:
        body = {"model": "fake", "messages": [{"role": "user", "content": text}], **fields}
        return await self.http.post("/v1/chat/completions", json=body)

    async def chunks(self, text: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of a streamed chat, which must end with [DONE]."""
        response = await self.chat(text, stream=True, **fields)
        assert response.status_code == 200, response.text
        return events(response.text)


def events(body: str) -> list[dict[str, Any]]:
    lines = [line for line in body.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


WireFactory = Callable[..., AbstractAsyncContextManager[Wire]]


@pytest.fixture(scope="session")
def open_wire() -> WireFactory:
    """`async with open_wire(engine, **service settings) as wire`; a fake engine by default."""

    @asynccontextmanager
    async def make(engine: FakeEngine | None = None, **settings: Any) -> AsyncIterator[Wire]:
        engine = engine or FakeEngine()
        service = make_fake_service(engine, **settings)
        transport = httpx.ASGITransport(make_fake_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield Wire(http, engine, service)

    return make


@pytest.fixture
async def wire(open_wire: WireFactory) -> AsyncIterator[Wire]:
    """A plain fake server in this process."""
    async with open_wire() as opened:
        yield opened


@dataclass(frozen=True)
class Live:
    """A server on a real port, in a thread of its own."""

    address: str
    engine: FakeEngine
    service: Service


@pytest.fixture
def live() -> Iterator[Live]:
    """A fake server that real clients reach over a real socket."""
    ready, found = threading.Event(), []

    def serve() -> None:
        async def main() -> None:
            engine = FakeEngine()
            service = make_fake_service(engine)
            listener = socket.create_server(("127.0.0.1", 0))
            config = uvicorn.Config(
                make_fake_app(service), http="h11", log_config=None, lifespan="off"
            )
            server = uvicorn.Server(config)
            port = listener.getsockname()[1]
            found.append((server, Live(f"http://127.0.0.1:{port}", engine, service)))
            ready.set()
            await server.serve(sockets=[listener])

        asyncio.run(main())

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(30)
    server, opened = found[0]
    yield opened
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


class Collector(HTTPServer):
    """An OpenTelemetry collector that keeps what is sent to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[tuple[str, bytes]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    @property
    def spans(self) -> list[Any]:
        messages = [ExportTraceServiceRequest.FromString(b) for b in self._bodies("/v1/traces")]
        scopes = [s for m in messages for r in m.resource_spans for s in r.scope_spans]
        return [span for scope in scopes for span in scope.spans]

    @property
    def events(self) -> list[Any]:
        messages = [ExportLogsServiceRequest.FromString(b) for b in self._bodies("/v1/logs")]
        scopes = [s for m in messages for r in m.resource_logs for s in r.scope_logs]
        return [record for scope in scopes for record in scope.log_records]

    def _bodies(self, path: str) -> list[bytes]:
        return [body for where, body in self.received if where == path]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        self.server.received.append((self.path, self.rfile.read(length)))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
