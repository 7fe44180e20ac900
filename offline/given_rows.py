"""How well the token head tells wrong facts from right ones in texts that somebody else wrote.

The model did not write these texts: a wrong fact surprises it where it knows better, and that shows
in the log-probability too. So the free detectors stand beside, and the residual stream's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from offline.baselines import TokenDetector
from offline.features import Features, load_features
from offline.given_text import GivenText
from offline.records import RecordError, read_records, sha256
from offline.shards import FOLDERS, FeaturesHeader, Kind
from offline.tables import gained, ranked
from probes.card import EvaluationRow


class Given(NamedTuple):
    """The texts and what the model read in them."""

    texts: dict[str, GivenText]
    features: Features


def load_given(run: Path, *, like: FeaturesHeader) -> Given | None:
    """None when `extract` was given no texts; RecordError when it read them otherwise than the
    answers, whose features have the header `like`."""
    path = run / "given.jsonl"
    if not path.exists():
        return None
    _, texts = read_records(path, GivenText)
    features = load_features(run / FOLDERS[path.name])
    if features.header != msgspec.structs.replace(like, labels_sha256=sha256(path)):
        raise RecordError(f"{path} and its features are of another run; run `extract` again")
    return Given({text.id: text for text in texts}, features)


def given_rows(given: Given, detectors: Mapping[str, TokenDetector]) -> Iterator[EvaluationRow]:
    """Of each kind of text: single tokens and means over facts, wrong against right. A unit is a
    text, so the figure within units compares facts of one text alone."""
    features = given.features
    judged = np.flatnonzero(np.isin(features.kind, (Kind.WRONG, Kind.RIGHT)))
    scores = {name: read(features, judged) for name, read in detectors.items()}
    at = {row: i for i, row in enumerate(judged.tolist())}
    first = np.searchsorted(features.answer, np.arange(len(features.ids)))
    texts = [given.texts[id] for id in features.ids]
    for kind in sorted({text.kind for text in texts}):
        facts = [
            (text.id, fact.wrong, [at[first[i] + token] for token in fact.tokens])
            for i, text in enumerate(texts)
            if text.kind == kind
            for fact in text.facts
            if fact.tokens
        ]
        wrong = np.array([wrong for _, wrong, _ in facts])
        sizes = [len(tokens) for *_, tokens in facts]
        units = np.array([id for id, *_ in facts])
        means = {
            name: np.array([score[tokens].mean() for *_, tokens in facts])
            for name, score in scores.items()
        }
        every = {
            name: np.concatenate([score[tokens] for *_, tokens in facts])
            for name, score in scores.items()
        }
        for level, judged_wrong, values, of in (
            ("facts", wrong, means, units),
            ("tokens", np.repeat(wrong, sizes), every, np.repeat(units, sizes)),
        ):
            dataset = f"given text, {level}: {kind}"
            for name, score in values.items():
                for row in ranked(dataset, name, judged_wrong, score, of):
                    if isinstance(row, EvaluationRow):  # a chart of each would double the report
                        yield row
            yield from gained(dataset, values, judged_wrong, of)
