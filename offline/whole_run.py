"""Several verbs as one: their options together, each run with its own, and how long each took."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from offline.records import write_atomic

# Seconds of each verb as it ran last. Hidden: all else in a run folder is the same after kills.
TIMES = ".times.json"

Verb: TypeAlias = Callable[..., None]


def union_of(verbs: Sequence[Verb], *, without: Sequence[str] = ()) -> inspect.Signature:
    """Every option of `verbs` once. An option that two of them have must say the same in both."""
    found: dict[str, inspect.Parameter] = {}
    for verb in verbs:
        for name, parameter in inspect.signature(verb, eval_str=True).parameters.items():
            alike = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            if name not in without and found.setdefault(name, alike) != alike:
                raise TypeError(f"{verb.__name__} has another {name!r} than the verbs before it")
    return inspect.Signature(list(found.values()), return_annotation=None)


def in_turn(
    verbs: Sequence[Verb], given: Mapping[str, object], times: Path
) -> Iterator[tuple[str, float]]:
    """Run each verb with those of `given` that it knows; yields each with its seconds.

    `times` keeps them. A run that was stopped and goes on gives the seconds of what was left.
    """
    taken: dict[str, float] = {}
    for verb in verbs:
        start = time.monotonic()
        verb(**{name: given[name] for name in inspect.signature(verb).parameters if name in given})
        taken[verb.__name__] = round(time.monotonic() - start, 1)
        write_atomic(times, msgspec.json.encode(taken))
        yield verb.__name__, taken[verb.__name__]
    yield "in all", sum(taken.values())
