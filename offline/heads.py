"""Neurons and weights of a probe's heads, fitted on given examples.

Each head finds its own neurons: the L1 path, cut where it has as many as the head's share of the
budget. All heads are then fitted again with an L2 penalty on the neurons of any, which the probe
reads anyway: L1 weights are shrunk, and a neuron that one head pays for is free for the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from offline.examples import Examples
from offline.features import Features, FloatArray, IntArray
from offline.l1_path import Solver, l1_path, standardise
from offline.metrics import Bools, Floats
from offline.records import Record, RecordError
from probes.probe import fold_scaler

# Standard deviation of each head's logits over the tokens that were fitted on. Their scale is free,
# since the calibration absorbs it; this one keeps what engines disagree about in bfloat16 (vLLM and
# transformers: 11 % of the spread at the worst of 143 tokens, 4 % at nine in ten, measured) inside
# the known-answer test's 0.03.
LOGIT_SPREAD = 0.2


class HeadSettings(Record, frozen=True, kw_only=True):
    """How neurons are found and weighed."""

    solver: Solver = "skglm"
    screened: int = 4096  # columns that the path sees, by distance of the class means
    strengths: tuple[float, ...] = (0.4, 0.2, 0.12, 0.085, 0.065, 0.05)
    penalties: tuple[float, ...] = (3.0, 0.3, 0.03, 0.003, 0.0003)  # L2, per example
    shares: tuple[tuple[str, float], ...] = (("token", 0.6), ("answer", 0.4))  # of a budget


class Weights(Record, frozen=True, kw_only=True):
    """The numbers of a probe on stored features, scaler folded in."""

    heads: tuple[str, ...]
    columns: tuple[int, ...]  # of `Features.cett`, ascending
    weight: tuple[tuple[float, ...], ...]  # [columns][heads]
    bias: tuple[float, ...]  # [heads]

    def read(self, values: FloatArray) -> Floats:
        """`[rows, heads]` logits from the values of `columns`."""
        logits: Floats = values.astype(np.float64) @ np.array(self.weight) + np.array(self.bias)
        return logits

    def head(self, index: int) -> Weights:
        """One head, on the same columns."""
        return Weights(
            heads=(self.heads[index],),
            columns=self.columns,
            weight=tuple((row[index],) for row in self.weight),
            bias=(self.bias[index],),
        )

    def logits(self, features: Features, rows: IntArray) -> Floats:
        """`[rows, heads]`: the probe as it will be served, on stored features."""
        return self.read(features.cett(rows, np.array(self.columns)))


def train(
    examples: Mapping[str, Examples],
    kept: Mapping[str, Bools],
    budgets: Sequence[int],
    settings: HeadSettings,
) -> list[list[Weights]]:
    """`[budgets][penalties]`: the heads of `examples`, fitted on the `kept` ones alone.

    The first head's examples are single tokens: by them the scale of all heads is set.
    """
    drafts = []
    for columns in find_columns(examples, kept, budgets, settings):
        weighed = [
            weigh(examples[head], kept[head], head, columns, settings.penalties)
            for head in examples
        ]
        tokens = next(iter(examples.values())).x[:, columns].astype(np.float32)
        drafts.append([_scaled(join(heads), tokens) for heads in zip(*weighed, strict=True)])
    return drafts


def find_columns(
    examples: Mapping[str, Examples],
    kept: Mapping[str, Bools],
    budgets: Sequence[int],
    settings: HeadSettings,
) -> list[IntArray]:
    """`[budgets]`: the columns that any of the heads finds in the `kept` examples, ascending."""
    shares = dict(settings.shares)
    found = []
    for head, one in examples.items():
        wanted = [round(shares[head] * budget) for budget in budgets]
        found.append(_find(one, kept[head], wanted, settings))
    return [np.unique(np.concatenate(of_heads)) for of_heads in zip(*found, strict=True)]


def train_as_the_paper(examples: Examples, kept: Bools, head: str, *, c: float) -> Weights:
    """L1 logistic regression on CETT as it is, by liblinear, which penalises the bias too."""
    from sklearn.linear_model import LogisticRegression

    rows, positive = examples.taken(kept)
    x = examples.x[rows].astype(np.float32)
    model = LogisticRegression(
        l1_ratio=1.0, C=c, solver="liblinear", max_iter=1000, random_state=0
    ).fit(x, positive)
    columns = np.flatnonzero(model.coef_[0])
    if not len(columns):
        raise RecordError(f"C {c:g} gives no neuron a weight; choose a larger one")
    weights = Weights(
        heads=(head,),
        columns=tuple(columns.tolist()),
        weight=tuple((w,) for w in model.coef_[0, columns].astype(np.float64).tolist()),
        bias=(float(model.intercept_[0]),),
    )
    return _scaled(weights, x[:, columns])


def weigh(
    examples: Examples, kept: Bools, head: str, columns: IntArray, penalties: Sequence[float]
) -> list[Weights]:
    """`[penalties]`: L2 logistic regressions of one head on `columns`."""
    from sklearn.linear_model import LogisticRegression

    rows, positive = examples.taken(kept)
    x = np.asfortranarray(examples.x[np.ix_(rows, columns)], dtype=np.float32)
    mean, scale = standardise(x)
    fitted = []
    for penalty in penalties:
        model = LogisticRegression(C=1 / (penalty * len(x)), max_iter=500).fit(x, positive)
        weight, bias = fold_scaler(
            model.coef_.astype(np.float64).T,
            model.intercept_.astype(np.float64),
            mean=mean.astype(np.float64),
            scale=scale.astype(np.float64),
        )
        fitted.append(
            Weights(
                heads=(head,),
                columns=tuple(columns.tolist()),
                weight=tuple((w,) for w in weight[:, 0].tolist()),
                bias=(float(bias[0]),),
            )
        )
    return fitted


def join(heads: Sequence[Weights]) -> Weights:
    """Heads that read the same columns, as one probe."""
    return Weights(
        heads=tuple(name for one in heads for name in one.heads),
        columns=heads[0].columns,
        weight=tuple(
            tuple(w for row in rows for w in row)
            for rows in zip(*(one.weight for one in heads), strict=True)
        ),
        bias=tuple(b for one in heads for b in one.bias),
    )


def _scaled(weights: Weights, values: FloatArray) -> Weights:
    """The same ranking, with a spread of LOGIT_SPREAD over `values` `[rows, columns]`."""
    unit = LOGIT_SPREAD / weights.read(values).std(axis=0)  # [heads]
    return msgspec.structs.replace(
        weights,
        weight=tuple(map(tuple, (np.array(weights.weight) * unit).tolist())),
        bias=tuple((np.array(weights.bias) * unit).tolist()),
    )


def _find(
    examples: Examples, kept: Bools, wanted: Sequence[int], settings: HeadSettings
) -> list[IntArray]:
    """For each of `wanted`, so many columns: the heaviest where the path first has that many."""
    screened = examples.strongest(kept, settings.screened)
    rows, positive = examples.taken(kept)
    x = np.asfortranarray(examples.x[np.ix_(rows, screened)], dtype=np.float32)
    standardise(x)
    found: dict[int, IntArray] = {}
    weight: Floats = np.zeros(x.shape[1])
    for _, weight, _ in l1_path(x, positive, settings.strengths, solver=settings.solver):
        for count in wanted:
            if count not in found and np.count_nonzero(weight) >= count:
                found[count] = _heaviest(weight, count)
        if len(found) == len(set(wanted)):
            break
    if not weight.any():
        raise RecordError("no strength gives a neuron a weight: nothing tells wrong from right")
    return [screened[found.get(count, _heaviest(weight, count))] for count in wanted]


def _heaviest(weight: Floats, count: int) -> IntArray:
    order = np.argsort(-np.abs(weight), kind="stable")[:count]
    return np.sort(order[weight[order] != 0])
