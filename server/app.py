"""The HTTP application: routes inside, pure ASGI layers around them.

Outermost first: Edge (id, headers, log line), CORS, API keys, gate (ready? draining?), body limit,
routes. No BaseHTTPMiddleware: it keeps an abandoned generation alive until garbage collection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from server.api import chat, completions, health, models, risk
from server.api.errors import install_error_handlers
from server.api.playground import playground_paths, playground_routes
from server.auth import OPEN_PATHS, ApiKeys
from server.edge import Edge
from server.lifecycle import Gate, Lifecycle
from server.limits import BodyLimit
from server.service import Service


@dataclass(frozen=True)
class App:
    """The ASGI callable, and the gate by which the process ends its open requests."""

    asgi: ASGIApp
    gate: Gate


def create_api(service: Service, lifecycle: Lifecycle, *, openapi: bool = True) -> FastAPI:
    """Routes and error handlers without any layer around them."""
    api = FastAPI(
        title="hneurons",
        version=version("hneurons"),
        openapi_url="/openapi.json" if openapi else None,
        docs_url=None,  # the UI loads scripts from a foreign origin
        redoc_url=None,
        redirect_slashes=False,  # to an address made of the client's Host header
    )
    api.state.service = service
    api.state.lifecycle = lifecycle
    for router in (
        chat.router,
        completions.router,
        risk.router,
        models.router,
        health.router,
    ):
        api.include_router(router)
    install_error_handlers(api)
    return api


def create_app(
    service: Service,
    lifecycle: Lifecycle,
    *,
    api_key_hashes: Sequence[bytes] = (),
    allowed_origins: Sequence[str] = (),
    playground: bool = False,
    metrics_on_main_port: bool = True,
) -> App:
    """Everything that the main port serves.

    With keys set, all of it but `/livez`, `/readyz` and the playground's files needs one, and
    `/openapi.json` is absent: the schema of a server that is guarded is committed with the
    project, not served.
    """
    api = create_api(service, lifecycle, openapi=not api_key_hashes)
    if metrics_on_main_port:
        api.router.routes.append(health.metrics_route(service.metrics.render))
    if playground:
        api.router.routes.extend(playground_routes())
    gate = Gate(BodyLimit(api), lifecycle=lifecycle)
    app: ASGIApp = gate
    if api_key_hashes:
        pages = playground_paths() if playground else ()
        app = ApiKeys(app, hashes=api_key_hashes, open_paths=(*OPEN_PATHS, *pages))
    if allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client adds a dozen of its own; the origin is the gate
            expose_headers=["x-request-id", "retry-after"],
        )
    return App(asgi=Edge(app, metrics=service.metrics), gate=gate)


def create_metrics_app(service: Service) -> FastAPI:
    """What `--metrics-port` serves: `/metrics` and nothing else."""
    app = FastAPI(openapi_url=None)
    app.router.routes.append(health.metrics_route(service.metrics.render))
    install_error_handlers(app)
    return app
