"""API keys: known by their sha256 only, compared in constant time, asked for on every path.

Deny by default: all routes but `/livez`, `/readyz` and the playground's files (a browser sends no
key for a page; the page asks for one) need a key once keys are set. The decision
looks at `scope["path"]`, never at a URL that is built from the Host header (CVE-2026-48746).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from probes.errors import HNeuronsError
from server.api.errors import APIError

MAX_KEY_BYTES = 512
OPEN_PATHS = ("/livez", "/readyz")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class KeysError(HNeuronsError):
    """The API keys cannot be used; the message never holds a key."""


def hash_keys(keys: str) -> tuple[bytes, ...]:
    """Digests of comma-separated keys, as HNEURONS_API_KEYS holds them."""
    words = [word.strip() for word in keys.split(",")]
    if not all(words):
        raise KeysError("HNEURONS_API_KEYS holds an empty key; unset it to serve without keys")
    if any(len(word.encode()) > MAX_KEY_BYTES for word in words):
        raise KeysError(f"HNEURONS_API_KEYS holds a key of more than {MAX_KEY_BYTES} bytes")
    return tuple(hashlib.sha256(word.encode()).digest() for word in words)


def read_key_hashes(path: Path) -> tuple[bytes, ...]:
    """Digests from a file: one sha256 in hex a line, as `printf %s KEY | sha256sum` prints it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"api_key_file: cannot read {str(path)!r} as text") from error
    digests: list[bytes] = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if not _DIGEST.fullmatch(words[0].lower()):
            raise KeysError(
                f"api_key_file: line {number} of {str(path)!r} is not a sha256 in hex; "
                "make one with `printf %s KEY | sha256sum`"
            )
        digests.append(bytes.fromhex(words[0]))
    if not digests:
        raise KeysError(f"api_key_file: {str(path)!r} holds no key")
    return tuple(digests)


class ApiKeys:
    """Lets a request pass when it carries a known key as `Authorization: Bearer KEY`.

    Sets `request.state.tenant` to the key's number, from 1: what engines keep of one tenant's
    prompts must not speed up, and so tell, what another one asks.
    """

    def __init__(
        self, app: ASGIApp, *, hashes: Sequence[bytes], open_paths: Sequence[str] = OPEN_PATHS
    ) -> None:
        self.app = app
        self.hashes = tuple(dict.fromkeys(hashes))
        self.open_paths = tuple(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope):
            await self.app(scope, receive, send)
            return
        if tenant := self._number(_bearer(scope)):
            scope.setdefault("state", {})["tenant"] = tenant
            await self.app(scope, receive, send)
            return
        refusal = APIError(
            401,
            "an API key is needed: send `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await refusal.response()(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        root = scope.get("root_path", "")  # the operator's, never the client's
        return scope["path"] in {root + path for path in self.open_paths}

    def _number(self, key: bytes | None) -> int:
        """Which of the keys this is, from 1; 0 when it is none."""
        if key is None:
            return 0
        digest = hashlib.sha256(key).digest()
        # No early exit: the time says nothing about which key, or how much of it, was right.
        return sum(
            number * hmac.compare_digest(digest, known)
            for number, known in enumerate(self.hashes, start=1)
        )


def _bearer(scope: Scope) -> bytes | None:
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, key = values[0].partition(b" ")
    key = key.strip()
    if scheme.lower() != b"bearer" or not 0 < len(key) <= MAX_KEY_BYTES:
        return None
    return bytes(key)
