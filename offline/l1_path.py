"""L1 logistic regression over a path of strengths, at the width of all neurons of a large model.

Of half a million columns a few hundred get a weight. Each strength is solved on a working set: the
columns whose gradient asks for a weight. The gradient of all columns, one matrix-vector product,
then names those that were left out wrongly, until there are none: the full problem's solution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offline.features import FloatArray
from offline.metrics import Bools, Floats
from offline.records import RecordError

Solver = Literal["skglm", "liblinear"]

BLOCK_BYTES = 2**27  # of columns that are standardised at a time
TOLERANCE = 1e-3  # of the gradient's largest element, of the strength where all weights are zero


class Point(NamedTuple):
    """One strength of a path."""

    strength: float
    weight: Floats  # [columns]
    bias: float


def parse_solver(text: str) -> Solver:
    """RecordError for an unknown solver."""
    if text not in ("skglm", "liblinear"):
        raise RecordError(f"solver {text!r} is not one of skglm, liblinear")
    return "skglm" if text == "skglm" else "liblinear"


def standardise(x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Centre and scale the columns of `x` in place; returns mean and scale `[columns]`.

    A constant column keeps scale 1: it becomes 0 and can get no weight. Memory beyond `x` is small.
    """
    columns = x.shape[1]
    mean, scale = np.empty(columns, x.dtype), np.empty(columns, x.dtype)
    step = max(1, BLOCK_BYTES // max(1, len(x) * x.itemsize))
    for start in range(0, columns, step):
        block = x[:, start : start + step]
        here = slice(start, start + block.shape[1])
        mean[here] = block.mean(axis=0)
        block -= mean[here]
        deviation = np.sqrt(np.einsum("ij,ij->j", block, block) / len(x))
        scale[here] = np.where(deviation == 0, 1.0, deviation)
        block /= scale[here]
    return mean, scale


def l1_path(
    x: FloatArray, positive: Bools, strengths: Sequence[float], *, solver: Solver = "skglm"
) -> Iterator[Point]:
    """Points of the path, sparsest first.

    x `[rows, columns]` float32, standardised, in Fortran order. A strength of 1 is the smallest at
    which every weight is zero. skglm starts each strength from the one before; liblinear is the
    small reference, solves every strength from nothing and on all columns, and needs no compiling.
    """
    y = np.where(positive, 1.0, -1.0).astype(x.dtype)
    gradient = _gradient(x, y, np.full(len(x), np.log(positive.mean() / (1 - positive.mean()))))
    largest = float(gradient.max())
    if not largest:
        raise RecordError("all features are constant: nothing can be fitted")
    if solver == "liblinear":
        yield from _reference_path(x, y, [(s, s * largest) for s in sorted(strengths)[::-1]])
        return
    from skglm import SparseLogisticRegression

    model = SparseLogisticRegression(warm_start=True, tol=TOLERANCE * largest)
    weight, bias = np.zeros(x.shape[1], x.dtype), 0.0
    for strength in sorted(strengths, reverse=True):
        alpha = strength * largest
        model.alpha = alpha
        working = (gradient > alpha) | (weight != 0)
        # Never one column alone: its layout is another type to the compiler (20 s).
        working[np.argpartition(gradient, -2)[-2:]] = True
        while True:
            chosen = np.flatnonzero(working)
            part = np.asfortranarray(x[:, chosen])
            model.coef_, model.intercept_ = weight[None, chosen], np.array([bias])
            model.fit(part, y)
            weight[chosen], bias = np.ravel(model.coef_), float(np.ravel(model.intercept_)[0])
            gradient = _gradient(x, y, part @ weight[chosen] + bias)
            missed = (gradient > alpha + TOLERANCE * largest) & ~working
            if not missed.any():
                break
            working |= missed
        yield Point(strength, weight.astype(np.float64), bias)


def _gradient(x: FloatArray, y: FloatArray, logit: NDArray[np.floating[Any]]) -> Floats:
    """Magnitude of the mean logistic loss' derivative by each column's weight, `[columns]`."""
    # log(1 + exp(-y * logit)) has the derivative -y / (1 + exp(y * logit))
    pull = (y / (1.0 + np.exp(np.clip(y * logit, -50.0, 50.0)))).astype(x.dtype)
    magnitude: Floats = np.abs(x.T @ pull) / len(x)
    return magnitude


def _reference_path(
    x: FloatArray, y: FloatArray, alphas: Sequence[tuple[float, float]]
) -> Iterator[Point]:
    from sklearn.linear_model import LogisticRegression

    # liblinear penalises the intercept; scaled by 100 that is next to nothing.
    model: Any = LogisticRegression(
        l1_ratio=1.0, solver="liblinear", intercept_scaling=100.0, max_iter=1000, random_state=0
    )
    for strength, alpha in alphas:
        model.set_params(C=1 / (alpha * len(x))).fit(x, y)
        yield Point(
            strength, np.ravel(model.coef_).astype(np.float64), float(np.ravel(model.intercept_)[0])
        )
