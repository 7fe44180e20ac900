"""Stop strings over text that arrives in pieces; vLLM's semantics."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the stop string that completes first; `push` every piece of text, in order."""

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self._strings = tuple(strings)
        # Newest characters that a stop string may still cut: they must not be shown yet.
        self.held = max((len(string) - 1 for string in self._strings), default=0)
        self._tail = ""  # those characters
        self._length = 0  # characters so far

    def push(self, piece: str) -> int | None:
        """Where the text must be cut, when this piece completes a stop string.

        The string that completes first wins, ties by their order; the cut is at its start.
        """
        if not self._strings or not piece:
            return None
        text = self._tail + piece
        offset = self._length - len(self._tail)
        found = [
            (start + len(string), order, start)
            for order, string in enumerate(self._strings)
            if (start := text.find(string)) >= 0
        ]
        self._length += len(piece)
        self._tail = text[-self.held :] if self.held else ""
        return offset + min(found)[2] if found else None
