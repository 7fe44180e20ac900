"""What a request may bring: so many bytes, in so much time, of strict JSON.

The body is counted while it streams in, with or without Content-Length, and reaches the
application whole and checked, or not at all.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import APIError
from server.strict_json import StrictJSONError, check_json

MAX_BODY_BYTES = 1024 * 1024
MAX_HEADER_BYTES = 64 * 1024  # request line and headers together; uvicorn enforces it (h11)
SECONDS_BETWEEN_BYTES = 10.0
SECONDS_PER_BODY = 60.0


class BodyLimit:
    """Reads the whole body, refuses what is too large, too slow or not strict JSON."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int = MAX_BODY_BYTES,
        seconds_between_bytes: float = SECONDS_BETWEEN_BYTES,
        seconds_per_body: float = SECONDS_PER_BODY,
    ) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.seconds_between_bytes = seconds_between_bytes
        self.seconds_per_body = seconds_per_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
            if body:
                _check_content(scope, body)
        except APIError as refusal:
            await refusal.response()(scope, receive, send)
            return
        if body is not None:
            await self.app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, or None when the client has gone."""
        too_large = APIError(
            413, f"the body is larger than {self.max_bytes} bytes", code="body_too_large"
        )
        length = _header(scope, b"content-length")
        if length is not None and _header(scope, b"transfer-encoding") is not None:
            # Two lengths are how one request is smuggled past a proxy inside another.
            raise APIError(400, "Content-Length and Transfer-Encoding exclude each other")
        if int(length or 0) > self.max_bytes:
            raise too_large
        body = bytearray()
        more = True
        try:
            async with asyncio.timeout(self.seconds_per_body):
                while more:
                    async with asyncio.timeout(self.seconds_between_bytes):
                        message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.max_bytes:
                        raise too_large
        except TimeoutError as error:
            raise APIError(
                408,
                "the body took too long to arrive",
                code="body_timeout",
                headers={"connection": "close"},
            ) from error
        return bytes(body)


def _has_body(scope: Scope) -> bool:
    length = _header(scope, b"content-length")
    return length not in (None, b"0") or _header(scope, b"transfer-encoding") is not None


def _check_content(scope: Scope, body: bytes) -> None:
    # A browser sends this type to a foreign origin only after asking (no CSRF by plain forms).
    kind, *parameters = (_header(scope, b"content-type") or b"").lower().split(b";")
    charsets = [p.strip() for p in parameters if p.strip().startswith(b"charset=")]
    is_utf8 = all(p.replace(b'"', b"") in (b"charset=utf-8", b"charset=utf8") for p in charsets)
    if kind.strip() != b"application/json" or not is_utf8:
        raise APIError(
            415,
            "send the body as `Content-Type: application/json`, in UTF-8",
            code="unsupported_media_type",
        )
    try:
        check_json(body)
    except StrictJSONError as error:
        raise APIError(400, str(error), code="invalid_json") from error


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives the body once and then what the connection says (a disconnect)."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
