"""What Python's JSON parser takes and a server must not."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.strict_json import MAX_DEPTH, MAX_VALUES, StrictJSONError, check_json

SOUND_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SOUND = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | SOUND_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(SOUND_TEXT, inner, max_size=4),
    max_leaves=20,
)


def nested(depth: int) -> bytes:
    """An object whose deepest container is at `depth`, itself counted."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@given(st.dictionaries(SOUND_TEXT, SOUND))
def test_every_sound_document_passes(document: dict[str, object]) -> None:
    """Prevents: a rule that refuses legal requests (emoji, int64 bounds, empty keys)."""
    check_json(json.dumps(document).encode())
    check_json(json.dumps(document, ensure_ascii=False).encode())


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(body: bytes) -> None:
    """Prevents: a parser exception that becomes a 500."""
    with contextlib.suppress(StrictJSONError):
        check_json(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"1",
        b"{",
        b'{"a": 1,}',
        b'{"a": 1} x',
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e400}',
        b'{"a": -1e400}',
        b'{"a": [1e999]}',
        b'{"a": 01}',
        b'{"a": 9223372036854775808}',
        b'{"a": -9223372036854775809}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\\ud800"}',
        b'{"a": "\\udc00\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"a": 1, "a": 2}',
        b'{"b": {"a": 1, "a": 1}}',
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": 1}'.encode("utf-16"),
        '{"a": 1}'.encode("utf-32-le"),
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "\n"}',
        b'{"a": "\\x"}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
)
def test_a_trap_is_refused(body: bytes) -> None:
    """Prevents: F3, a value that the schema, the log or the encoder trips over later."""
    with pytest.raises(StrictJSONError):
        check_json(body)


def test_depth_is_refused_only_beyond_the_limit() -> None:
    """Prevents: an off-by-one, and a limit that is not enforced at all."""
    check_json(nested(MAX_DEPTH))
    with pytest.raises(StrictJSONError, match="nested"):
        check_json(nested(MAX_DEPTH + 1))


def test_values_are_refused_only_beyond_the_limit() -> None:
    """Prevents: a megabyte of `1,` that keeps the event loop busy in the schema."""
    check_json(json.dumps({"a": [1] * (MAX_VALUES - 1)}).encode())
    with pytest.raises(StrictJSONError, match="values"):
        check_json(json.dumps({"a": [1] * MAX_VALUES}).encode())


def test_the_refusal_never_quotes_the_body() -> None:
    """Prevents: a planted prompt that comes back in an error or a log."""
    for body in (b'{"canary": NaN}', b'{"canary', b'{"canary": "\\ud800"}', b'["canary"]'):
        with pytest.raises(StrictJSONError) as refusal:
            check_json(body)
        assert "canary" not in str(refusal.value)
