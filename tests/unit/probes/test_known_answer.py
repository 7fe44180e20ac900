"""A model that reads other logits than the probe recorded is refused."""

from __future__ import annotations

import msgspec
import pytest
import torch

from probes.errors import KnownAnswerError
from probes.known_answer import build, check
from probes.tap import Meter

SEQUENCES = [(5, 6, 7, 8), (40, 3)]


def _reader(model, ffns, probe, *, alpha=1.0):
    def read(token_ids):
        with torch.no_grad(), Meter(ffns, [probe], suppression=True) as meter:
            meter.begin([(0, alpha)])
            model(torch.tensor([token_ids]))
            return meter.logits()[0].tolist()

    return read


@pytest.fixture
def tested(llama, ffns, make_probe):
    probe = make_probe(ffns)
    answers = build(SEQUENCES, _reader(llama, ffns, probe))
    return make_probe(ffns, known_answers=answers)


def test_the_same_model_passes(llama, ffns, tested):
    read = _reader(llama, ffns, tested)
    check(tested, [read(answer.token_ids) for answer in tested.card.known_answers])


def test_another_computation_is_refused_with_both_numbers(llama, ffns, tested):
    """Equal weights, other arithmetic: no fingerprint sees it."""
    read = _reader(llama, ffns, tested, alpha=0.5)
    with pytest.raises(KnownAnswerError, match=r"tiny@.*known answer 0, token 0: .* logit .* rec"):
        check(tested, [read(answer.token_ids) for answer in tested.card.known_answers])


@pytest.mark.parametrize(
    ("dtype", "error", "passes"),
    [
        ("float32", 0.9e-4, True),
        ("float32", 1.1e-4, False),
        ("bfloat16", 0.029, True),
        ("bfloat16", 0.031, False),
        ("float16", 0.029, True),
        ("float16", -0.031, False),
        ("bfloat16", float("nan"), False),
        ("bfloat16", float("inf"), False),
    ],
)
def test_limits_by_dtype(dtype, error, passes, make_probe, make_card):
    """NaN compares false with everything: a plain `abs(..) > limit` lets it pass."""
    probe = make_probe(model=msgspec.structs.replace(make_card().model, dtype=dtype))
    found = [[0.25, -0.5], [0.25, -0.5], [0.25, -0.5 + error]]
    if passes:
        check(probe, [found])
    else:
        with pytest.raises(KnownAnswerError, match="known answer 0, token 2"):
            check(probe, [found])


@pytest.mark.parametrize(
    "found", [[], [[[0.25, -0.5]]], [[[0.25], [0.25], [0.25]]], [[[0.25, -0.5]] * 3] * 2]
)
def test_missing_readings_are_refused(found, make_probe):
    """An engine that reads nothing must not pass for lack of a difference."""
    with pytest.raises(KnownAnswerError):
        check(make_probe(), found)
