"""What machines ask: alive, ready, which version, how many."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response
from starlette.routing import Route

from server.metrics import CONTENT_TYPE

router = APIRouter(tags=["health"])


class Alive(BaseModel):
    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    status: Literal["ready"] = "ready"


class Version(BaseModel):
    """Versions of what decides an answer; no paths."""

    version: str
    torch: str | None
    transformers: str | None


@router.get("/livez")
async def livez() -> Alive:
    """The process answers. Says nothing about the model."""
    return Alive()


@router.get("/readyz", responses={503: {"description": "starting, draining or dead"}})
async def readyz(request: Request) -> Ready:
    """A request would be served now; else 503 with the reason as `code`."""
    refusal = request.app.state.lifecycle.refusal()
    if refusal is not None:
        raise refusal
    return Ready()


@router.get("/version")
async def read_version() -> Version:
    return Version(
        version=_version("hneurons") or "unknown",
        torch=_version("torch"),
        transformers=_version("transformers"),
    )


def metrics_route(render: Callable[[], bytes]) -> Route:
    """`GET /metrics` in Prometheus' text format."""

    async def metrics(_: Request) -> Response:
        return Response(render(), media_type=CONTENT_TYPE)

    return Route("/metrics", metrics, methods=["GET"], include_in_schema=False)


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
