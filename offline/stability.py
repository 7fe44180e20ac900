"""How stable the choice of neurons is: which of them another half of the data would name, too."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from offline.examples import Examples
from offline.fit_result import TOKEN, FitSettings
from offline.heads import find_columns, train_as_the_paper
from offline.metrics import Bools, has_both

log = logging.getLogger(__name__)


def found_again(
    examples: Mapping[str, Examples], columns: Sequence[int], budget: int, settings: FitSettings
) -> tuple[float, ...]:
    """Stability selection (Meinshausen and Buehlmann 2010): of each of `columns`, the share of fits
    on a random half of the relations and questions in which it was found, too. Near 1 a neuron is
    there whatever half is seen, near 0 another half names others.

    Nothing without resamples, or when hardly a half holds right and wrong answers.
    """
    names = np.unique(np.concatenate([one.unit for one in examples.values()]))
    random = np.random.default_rng(settings.seed)
    count: Counter[int] = Counter()
    done = 0
    silent = None if settings.resamples else True
    with tqdm(total=settings.resamples, desc="halves", unit="fit", disable=silent) as bar:
        for _ in range(2 * settings.resamples):
            half = random.permutation(names)[: len(names) // 2]
            kept = {head: np.isin(one.unit, half) for head, one in examples.items()}
            if all(has_both(one.positive[kept[head]]) for head, one in examples.items()):
                count.update(_columns_of(examples, kept, budget, settings))
                done += 1
                bar.update()
            if done == settings.resamples:
                return tuple(count[column] / done for column in columns)
    if settings.resamples:
        log.warning(
            "how stable the neurons are is not known: only %d of %d halves of the %d relations and "
            "questions hold right and wrong answers",
            *(done, 2 * settings.resamples, len(names)),
        )
    return ()


def _columns_of(
    examples: Mapping[str, Examples], kept: Mapping[str, Bools], budget: int, settings: FitSettings
) -> tuple[int, ...]:
    if settings.design == "tokens":
        (columns,) = find_columns(examples, kept, [budget], settings.heads)
        return tuple(columns.tolist())
    return train_as_the_paper(examples[TOKEN], kept[TOKEN], TOKEN, c=settings.c).columns
