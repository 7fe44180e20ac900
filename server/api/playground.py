"""The playground: a page at `/` whose files are a fixed list, read once when the app is made.

There is no directory, no path parameter and no template: a request can only name one of `FILES`.
The page talks to the same `/v1` as everybody else and knows nothing that a client cannot know.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "answer.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "main.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "sse.js": "text/javascript; charset=utf-8",
    "words.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "examples.js": "text/javascript; charset=utf-8",
    "spans.js": "text/javascript; charset=utf-8",
    "probe.js": "text/javascript; charset=utf-8",
    "answer.js": "text/javascript; charset=utf-8",
    "column.js": "text/javascript; charset=utf-8",
    "sparkline.js": "text/javascript; charset=utf-8",
    "token-card.js": "text/javascript; charset=utf-8",
}

# Model output is hostile. The page only ever sets textContent; this is the second lock: no inline
# script, no foreign origin, and (Trusted Types) no string that a browser would parse as HTML.
_CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

_HEADERS = {
    "content-security-policy": _CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Always ask, answer 304 when nothing changed: an upgraded server never runs an old page.
    "cache-control": "no-cache",
}


def playground_paths() -> tuple[str, ...]:
    """What the page asks for before it can ask for an API key: public where it is served."""
    return tuple(_path(name) for name in FILES)


def playground_routes() -> list[Route]:
    """One GET route per packaged file; `/` is index.html. FileNotFoundError if one is missing."""
    folder = files("server") / "playground"
    return [
        _route(_path(name), (folder / name).read_bytes(), media_type)
        for name, media_type in FILES.items()
    ]


def _path(name: str) -> str:
    return "/" if name == "index.html" else f"/playground/{name}"


def _route(path: str, body: bytes, media_type: str) -> Route:
    headers = {**_HEADERS, "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"'}

    async def serve(request: Request) -> Response:
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=media_type, headers=headers)

    return Route(path, serve, methods=["GET"], include_in_schema=False)
