"""Rows of the card about whole responses: what thresholds flag, and which pooling ranks them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from offline import metrics
from offline.dataset import Dataset
from offline.domains import ORDINARY_RESPONSES
from offline.fit_result import FitResult
from offline.metrics import Floats
from offline.mixtures import POOLINGS, pooled, response_mixture
from offline.tables import CALIBRATION, flagged, has_both, table
from probes.calibration import calibrate
from probes.card import EvaluationRow


def response_rows(data: Dataset, result: FitResult, logits: Floats) -> Iterator[EvaluationRow]:
    """What the operating points of responses flag, and whether their risks hold."""
    answers, wrong = response_mixture(data, "test")
    risk = calibrate(result.response, pooled(data, logits, answers, result.pooling))
    units = data.unit[data.first[answers]]
    long = np.arange(len(answers)) >= len(answers) - len(data.ordinary("test"))
    for name, of in (
        ("wrong responses", wrong),
        ("right responses", ~wrong & ~long),
        (ORDINARY_RESPONSES, long),
        ("responses that are not wrong", ~wrong),
    ):
        yield from flagged(name, result.response_points, risk[of], units[of])
    yield from table(CALIBRATION, "response risk", "probe", wrong, risk, units)


def pooling_rows(data: Dataset, result: FitResult, logits: Floats) -> Iterator[EvaluationRow]:
    """Every pooling of every head; which one is served was chosen on the fit part."""
    answers, wrong = response_mixture(data, "test")
    units = data.unit[data.first[answers]]
    short = np.arange(len(answers)) < len(answers) - len(data.ordinary("test"))
    sets = {
        "pooling, short answers": short,
        "pooling, short and ordinary long answers": np.ones(len(short), dtype=np.bool_),
    }
    sets = {dataset: of for dataset, of in sets.items() if has_both(dataset, wrong[of])}
    for pooling in POOLINGS:
        for head, name in enumerate(result.chosen.heads):
            score = pooled(data, logits[:, head], answers, pooling)
            detector = f"{name} head, {pooling.kind} {pooling.window}"
            for dataset, of in sets.items():
                yield from table(
                    {"auroc": metrics.auroc}, dataset, detector, wrong[of], score[of], units[of]
                )
