"""Every refusal in OpenAI's error shape: `{"error": {"message", "type", "param", "code"}}`.

Messages are ours; what the client sent is never echoed, except the names of its fields, and those
only when they are short and plain. An unexpected exception is a 500 without any detail.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from probes.errors import HNeuronsError
from server.engines.base import EngineDeadError, EngineOverloadedError, RequestFailedError

RETRY_AFTER_OVERLOADED = 1  # seconds; a slot is free again within a few decoding steps
RETRY_AFTER_UNAVAILABLE = 5  # seconds; about what a restart or another replica needs
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class APIError(Exception):
    """What a client is told: an HTTP status, or an error event once a stream has begun.

    status       HTTP status, 4xx or 5xx
    message      one sentence with the remedy; never holds what the client sent
    param        dotted path of the offending field, e.g. `risk.alpha`
    code         short stable word, e.g. `model_not_found`
    retry_after  seconds, sent as `Retry-After`
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)
        super().__init__(message)

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error object, alike for a JSON body and for an error event in a stream."""
        if self.status == 429:
            kind = "rate_limit_error"
        else:
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def to_api_error(error: Exception) -> APIError:
    """Translate anything that a handler or a stream raises; total, so no detail can leak."""
    match error:
        case APIError():
            return error
        case RequestValidationError():
            return _validation_error(error)
        case HTTPException():
            return _http_error(error)
        case EngineOverloadedError():
            return APIError(
                429,
                "the server's queue is full; try again later",
                code="overloaded",
                retry_after=RETRY_AFTER_OVERLOADED,
            )
        case EngineDeadError():
            return APIError(
                503,
                "the model has stopped; the server is restarting or being replaced",
                code="engine_dead",
                retry_after=RETRY_AFTER_UNAVAILABLE,
            )
        case RequestFailedError():
            return APIError(500, "the model could not finish this request", code=error.code)
        case HNeuronsError():
            return APIError(500, "the monitor could not finish this request", code="monitor_failed")
        case _:
            return APIError(500, "internal error", code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Render every exception of `app` by `to_api_error`; replaces FastAPI's own 422 handler."""
    for kind in (APIError, RequestValidationError, HTTPException, HNeuronsError, Exception):
        app.add_exception_handler(kind, _handle)


async def _handle(_: Request, error: Exception) -> Response:
    return to_api_error(error).response()


def _http_error(error: HTTPException) -> APIError:
    known = {
        404: ("no such route", "not_found"),
        405: ("this route does not take that method", "method_not_allowed"),
    }
    message, code = known.get(error.status_code, ("the request cannot be served", None))
    headers = dict(error.headers or {})
    return APIError(error.status_code, message, code=code, headers=headers)


def _validation_error(error: RequestValidationError) -> APIError:
    """One refusal for the most telling finding: the deepest one about the first bad field.

    A union reports one finding per member; the deepest is about the member that was meant.
    """
    found = [(_path(finding, error.body), finding) for finding in error.errors()]
    first = found[0][0][:1]
    path, finding = max(
        (pair for pair in found if pair[0][:1] == first), key=lambda pair: len(pair[0])
    )
    param = ".".join(path) or None
    reason = _reason(finding)
    return APIError(
        400, f"{param}: {reason}" if param else reason, param=param, code=_code(finding)
    )


def _path(finding: dict[str, Any], body: object) -> tuple[str, ...]:
    """The client's own path to the finding, without pydantic's labels of union members."""
    place, *loc = finding["loc"]
    if place != "body":
        return tuple(str(part) for part in loc)
    path: list[str] = []
    here = body
    for i, part in enumerate(loc):
        is_last = i == len(loc) - 1
        if isinstance(part, int):
            if not isinstance(here, Sequence) or isinstance(here, str) or part >= len(here):
                continue
            here = here[part]
        elif isinstance(here, dict) and part in here:
            here = here[part]
        elif not (is_last and finding["type"] == "missing"):
            continue  # a label such as "RiskOptions" or "bool", not a key of the client's
        if not _PLAIN_NAME.fullmatch(str(part)):
            break
        path.append(str(part))
    return tuple(path)


def _reason(finding: dict[str, Any]) -> str:
    match finding["type"]:
        case "extra_forbidden":
            return "unknown or unsupported field"
        case "missing":
            return "field required"
        case "union_tag_invalid":  # pydantic's own sentence quotes the tag that was sent
            return f"expected one of {finding['ctx']['expected_tags']}"
        case "model_attributes_type" | "model_type" | "dict_type":
            return "expected a JSON object"
        case "json_invalid":
            return "the body is not valid JSON"
        case "value_error":
            return cast(str, finding["msg"]).removeprefix("Value error, ")
        case _:
            return cast(str, finding["msg"])


def _code(finding: dict[str, Any]) -> str:
    match finding["type"]:
        case "missing":
            return "missing_required_parameter"
        case "extra_forbidden":
            return "unknown_parameter"
        case _:
            return "invalid_value"
