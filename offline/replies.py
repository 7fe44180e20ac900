"""What models said when they were asked about answers, kept so that nothing is asked twice.

One file per model and instruction, RUN/replies/WHAT-DIGEST.jsonl; a prompt that recurs (ten samples
that say the same) is asked once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from offline.records import Appender, Header, Reply, read_records, sort_records


class Replies:
    """`missing` -> ask -> `append` each -> `finish` -> `of`."""

    def __init__(self, folder: Path, what: str, header: Header, **settings: str) -> None:
        self._header = msgspec.structs.replace(header, kind="replies", settings=settings)
        name = digest(msgspec.json.encode(settings, order="sorted").decode())[:12]
        self.path = folder / f"{what}-{name}.jsonl"
        with Appender(self.path, self._header):
            pass  # started, or its torn tail cut off

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Prompts without a reply, each once, in an order of their own."""
        known = self._known()
        by_id = {digest(prompt): prompt for prompt in prompts}
        return [by_id[id] for id in sorted(by_id) if id not in known]

    def appender(self) -> Appender:
        return Appender(self.path, self._header)

    def of(self, prompts: Sequence[str]) -> list[str]:
        """The reply to each prompt; all must be there."""
        sort_records(self.path, Reply)
        known = self._known()
        return [known[digest(prompt)] for prompt in prompts]

    def _known(self) -> dict[str, str]:
        return {reply.id: reply.text for reply in read_records(self.path, Reply)[1]}


def reply(prompt: str, text: str) -> Reply:
    """The record of what was said to `prompt`."""
    return Reply(id=digest(prompt), text=text)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
