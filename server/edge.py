"""The outermost layer: every request gets an id, security headers and one log line.

Also the last resort: an exception that nobody handled ends here, as a type and a trace in the log
and as a 500 without detail for the client.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import to_api_error
from server.metrics import Metrics

_CLIENT_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# Refusals are counted by these words: a closed set, whatever a client sends.
_REFUSALS = {
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "too_large",
    415: "media_type",
    429: "overloaded",
    503: "unavailable",
}
FAILED = "failed"  # key of the log line: why a request that was accepted could not be finished
_CLIENT_GONE = 499  # nobody reads that answer; counted as an abort where it happens
_QUIET_ROUTES = frozenset({"/livez", "/readyz", "/metrics"})
_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}

log = logging.getLogger(__name__)


class Edge:
    """Sets `request.state.request_id` and `request.state.record` and logs both at the end.

    Handlers put what the line should say into `record`: counts, the probe's id, a finish reason;
    never text.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        request_id = _request_id(scope)
        record: dict[str, object] = {}
        scope.setdefault("state", {}).update(request_id=request_id, record=record)
        status = 0  # the client left before there was an answer

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:  # the last resort: nothing outside could tell the client
            log.error("unhandled", extra={"request_id": request_id}, exc_info=error)
            if status == 0:
                await to_api_error(error).response()(scope, receive, send_with_headers)
        finally:
            if status >= 400 and status != _CLIENT_GONE and FAILED not in record:
                word = "failed" if status == 500 else "invalid_request"
                self.metrics.request_rejected(_REFUSALS.get(status, word))
            _log_request(scope, status, started, request_id, record)


def _request_id(scope: Scope) -> str:
    sent = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(sent) == 1 and _CLIENT_ID.fullmatch(sent[0]):
        return bytes(sent[0]).decode("ascii")
    return uuid.uuid4().hex


def _log_request(
    scope: Scope, status: int, started: float, request_id: str, record: dict[str, object]
) -> None:
    # The route's own path, never the one that was asked for: that is the client's text.
    route = getattr(scope.get("route"), "path", "page" if "endpoint" in scope else "unknown")
    level = logging.DEBUG if route in _QUIET_ROUTES and status == 200 else logging.INFO
    line = {
        "request_id": request_id,
        "method": scope["method"] if route != "unknown" else "unknown",
        "route": route,
        "status": status,
        "seconds": round(time.monotonic() - started, 4),
        **record,
    }
    log.log(level, "request", extra=line)
