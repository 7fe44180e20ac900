"""JSON without its traps, checked before any schema sees the body.

Python's parser takes NaN, 1e400, lone surrogates, duplicate keys and any depth. Each of them has
crashed or misled a server; here each is one sentence. The values themselves are never quoted.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 32
MAX_VALUES = 131_072
INT64 = range(-(2**63), 2**63)


class StrictJSONError(ValueError):
    """The body is not the JSON that this server takes."""


def check_json(body: bytes) -> None:
    """Refuse what is not a JSON object of finite numbers, sound text and modest size."""
    try:
        document = json.loads(
            body.decode("utf-8"), parse_constant=_constant, object_pairs_hook=_object
        )
    except StrictJSONError:
        raise
    except UnicodeDecodeError as error:
        raise StrictJSONError("the body is not UTF-8") from error
    except RecursionError as error:
        raise StrictJSONError(_TOO_DEEP) from error
    except ValueError as error:  # malformed, a byte order mark, or an integer of > 4300 digits
        raise StrictJSONError("the body is not valid JSON") from error
    if not isinstance(document, dict):
        raise StrictJSONError("the body must be a JSON object")
    _check_values(document)


_TOO_DEEP = f"the body is nested deeper than {MAX_DEPTH} levels"


def _constant(_: str) -> NoReturn:
    raise StrictJSONError("NaN and Infinity are not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise StrictJSONError("an object has the same key twice")
    return document


def _check_values(document: dict[str, Any]) -> None:
    """Walk level by level, without recursion, and stop at the first finding."""
    seen = 0
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        children: list[Any] = []
        for container in level:
            values = container
            if isinstance(container, dict):
                for key in container:
                    _check_text(key)
                values = container.values()
            seen += len(container)
            if seen > MAX_VALUES:
                raise StrictJSONError(f"the body holds more than {MAX_VALUES} values")
            for value in values:
                if isinstance(value, dict | list):
                    children.append(value)
                elif isinstance(value, str):
                    _check_text(value)
                elif isinstance(value, float):
                    if not math.isfinite(value):
                        raise StrictJSONError("a number is too large")
                elif isinstance(value, int) and value not in INT64:
                    raise StrictJSONError("an integer does not fit 64 bits")
        if not children:
            return
        level = children
    raise StrictJSONError(_TOO_DEEP)


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise StrictJSONError("a string holds half of a surrogate pair") from error
