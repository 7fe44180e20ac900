"""Everything this project refuses, in one tree. Each message names the value and the remedy.

HNeuronsError
├── ModelError              the model cannot be read (FFN not found, mixture of experts, ...)
├── ProbeError
│   ├── ProbeFormatError    the files are not a probe: corrupt, unknown field, NaN, pickle, ...
│   ├── ProbeMismatchError  a sound probe, but of another model
│   └── KnownAnswerError    the model reads other logits than the probe's own test says
└── EngineError             (server/engines/base.py)
"""

from __future__ import annotations


class HNeuronsError(Exception):
    """Base of every error that a user can cause and repair."""


class ModelError(HNeuronsError):
    """The model cannot be monitored; the message says what was found and what was expected."""


class ProbeError(HNeuronsError):
    """A probe cannot be used."""


class ProbeFormatError(ProbeError):
    """The files are not a valid probe."""


class ProbeMismatchError(ProbeError):
    """The probe is bound to another model than the one that is loaded."""

    def __init__(self, probe: str, field: str, *, expected: object, found: object) -> None:
        self.field = field
        self.expected = expected
        self.found = found
        super().__init__(
            f"probe {probe!r} does not belong to this model: {field} is {found!r}, "
            f"the probe was fitted on {expected!r}; fit a probe on this model "
            f"(python -m offline) or load the model that the probe names"
        )


class KnownAnswerError(ProbeError):
    """The production path reads other logits than the probe's known-answer test records."""
