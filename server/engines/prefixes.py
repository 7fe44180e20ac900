"""Keys and values of prompts that were read, kept for prompts that begin alike.

Only equal *salts* share: keys and values depend on the suppression that wrote them, and the time
that sharing saves would tell one tenant what another one asks. Knows no request and no scheduling.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from server.engines.cache import BatchCache, States

Ids: TypeAlias = tuple[int, ...]
Salt: TypeAlias = tuple[int, int, float]  # tenant, suppression set, alpha


class Prefix(NamedTuple):
    """The first `tokens` tokens of a prompt, as a pass has left them."""

    tokens: int
    states: States


UNKNOWN = Prefix(0, ())


class PrefixCache:
    """The prompts that were read last, together at most `max_tokens` long."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._kept: OrderedDict[tuple[Salt, Ids], States] = OrderedDict()  # last used last
        # Of all keys that sort around a prompt, a neighbour begins most like it.
        self._sorted: list[tuple[Salt, Ids]] = []
        self.tokens = 0  # that are kept

    def find(self, salt: Salt, prompt: Ids, *, most: int) -> Prefix:
        """The longest known beginning of `prompt`, of at most `most` tokens."""
        at = bisect_left(self._sorted, (salt, prompt))
        near = [key for key in self._sorted[max(0, at - 1) : at + 1] if key[0] == salt]
        if not near:
            return UNKNOWN
        key = max(near, key=lambda key: shared(key[1], prompt))
        tokens = min(shared(key[1], prompt), most)
        if tokens <= 0:
            return UNKNOWN
        self._kept.move_to_end(key)
        return Prefix(tokens, self._kept[key])

    def takes(self, prompt: Ids) -> bool:
        """Whether there is room for a prompt of this length."""
        return len(prompt) <= self._max_tokens

    def keep(self, salt: Salt, prompt: Ids, cache: BatchCache, row: int) -> None:
        """Copy what `cache` holds of `prompt` in `row`; what was used longest ago makes room."""
        key = (salt, prompt)
        if not self.takes(prompt) or key in self._kept:
            return
        while self.tokens + len(prompt) > self._max_tokens:
            self._forget(next(iter(self._kept)))
        self._kept[key] = tuple(
            (keys[:, : len(prompt)].clone(), values[:, : len(prompt)].clone())
            for keys, values in cache.states(row)
        )
        insort(self._sorted, key)
        self.tokens += len(prompt)

    def clear(self) -> None:
        """Forget everything."""
        for key in list(self._kept):
            self._forget(key)

    def _forget(self, key: tuple[Salt, Ids]) -> None:
        del self._kept[key]
        del self._sorted[bisect_left(self._sorted, key)]
        self.tokens -= len(key[1])


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices compare at the speed of C
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
