"""Prompts that are read together, and what is known of them before."""

from __future__ import annotations

from collections.abc import Sequence

from server.engines.forward import Forward
from server.engines.prefixes import Prefix, PrefixCache, shared
from server.engines.row import Row

# Tokens that a prompt must have beyond what is known of it for its keys and values to be kept, and
# that two waiting prompts must share for one to wait until the other was read.
WORTH_SHARING = 16


class Prefill:
    """Prompts that are read together, chunk by chunk; a row leaves when it has been read."""

    def __init__(self, forward: Forward, prefixes: PrefixCache) -> None:
        self.rows: list[Row] = []
        self.start = 0  # tokens of every row that are known before the first chunk
        self._known: list[Prefix] = []
        self._forward = forward
        self._prefixes = prefixes

    def offer(self, row: Row, budget: int) -> None:
        """Take `row`, unless a pass of `budget` tokens cannot hold it without much padding, or more
        of it is known once the rows here have been read."""
        known = self._prefixes.find(row.salt, row.prompt, most=row.unread)
        if not self.rows or (self._fits(row, known, budget) and not self._teaches(row, known)):
            self.rows.append(row)
            self._known.append(known)

    def _fits(self, row: Row, known: Prefix, budget: int) -> bool:
        both = [*zip(self.rows, self._known, strict=True), (row, known)]
        start = min(prefix.tokens for _, prefix in both)
        longest = max(len(one.prompt) for one, _ in both) - start
        shortest = min(len(one.prompt) - prefix.tokens for one, prefix in both)
        return len(both) * longest <= budget and longest <= 2 * shortest + 16

    def _teaches(self, row: Row, known: Prefix) -> bool:
        return any(
            one.salt == row.salt
            and self._prefixes.takes(one.prompt)
            and min(shared(one.prompt, row.prompt), row.unread) >= known.tokens + WORTH_SHARING
            for one in self.rows
        )

    def begin(self) -> None:
        """Give every row what is known of all of them: rows of one pass are equally long."""
        self.start = min(known.tokens for known in self._known)
        self.cache = self._forward.new_cache(0 if self.start else len(self.rows))
        for known in self._known if self.start else ():
            self.cache.append(known.states, tokens=self.start)

    def chunk(self, budget: int) -> list[tuple[int, ...]]:
        """The next tokens of every row, at most `budget` over all rows."""
        start = self.cache.lengths[0]  # all rows are read equally far: none ends and stays
        stop = start + max(1, budget // len(self.rows))
        return [row.prompt[start:stop] for row in self.rows]

    def retire(self, indices: Sequence[int]) -> None:
        """Drop the rows at `indices`."""
        for index in sorted(indices, reverse=True):
            self.cache.retire(index)
            self.rows[index] = self.rows[-1]
            self.rows.pop()
