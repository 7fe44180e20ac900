"""Features joined with their labels and split: what `fit` and `evaluate` work on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from offline.choice import WRONG_PER_RIGHT_OF_GROUP, balance
from offline.features import Features, IntArray, load_features
from offline.records import Answer, Label, Labelled, RecordError, read_labelled, sha256
from offline.shards import Kind
from offline.splits import Part, Split, assign

Names = NDArray[np.str_]
T = TypeVar("T", Answer, Label)

# Runs within a run, of which only the answer head is fitted (offline/augment.py).
AUGMENTED = ("augmented/samples", "augmented/told")
OF = "of_labels_sha256"  # in their labels: which labels of the run they were made for
FITTED: tuple[Part, ...] = ("fit", "augmented")  # the parts that an answer head is fitted on


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows are tokens, in the order of `features`; answers are those of `features.ids`.

    part, unit [rows]: a unit (relation or question) lies in one part only. first [answers + 1]:
    the rows of answer i are `first[i] .. first[i + 1] - 1`, in the order of the text. The first
    `own` answers are the run's own; behind them stand those of the runs within it, of whose labels
    `augmented` has the digests.
    """

    features: Features
    answers: tuple[Answer, ...]
    labels: tuple[Label, ...]
    part: Names
    unit: Names
    first: IntArray
    split: Split
    own: int
    augmented: dict[str, str]

    def even_rows(self, part: Part, *kinds: Kind) -> IntArray:
        """Rows of `even` answers of a part whose token is of one of `kinds`."""
        answers = self.even(self.answered(part))
        rows = self.rows(part, *kinds)
        return rows[np.isin(self.features.answer[rows], answers)]

    def rows(self, part: Part, *kinds: Kind) -> IntArray:
        """Rows of a part whose token is of one of `kinds`."""
        chosen = (self.part == part) & np.isin(self.features.kind, kinds)
        return np.flatnonzero(chosen)

    def answered(self, *parts: Part, source: str = "", style: str = "") -> IntArray:
        """Indices of the right and wrong answers of parts (and source, style when given)."""
        return np.array(
            [
                i
                for i, (answer, label) in enumerate(zip(self.answers, self.labels, strict=True))
                if label.verdict in ("right", "wrong")
                and self.part[self.first[i]] in parts
                and source in ("", answer.source)
                and style in ("", answer.style)
            ],
            dtype=np.int64,
        )

    def even(
        self, answers: IntArray, *, wrong_per_right: float = WRONG_PER_RIGHT_OF_GROUP
    ) -> IntArray:
        """Those of `answers` that are left when each group keeps at most so many wrong ones per
        right one."""
        labels = balance(
            [self.answers[i] for i in answers],
            [self.labels[i] for i in answers],
            wrong_per_right=wrong_per_right,
            right_per_wrong=0.0,
            inside_groups=True,
        )
        return answers[np.array([not label.dropped for label in labels], dtype=np.bool_)]

    def located(self, answers: IntArray) -> IntArray:
        """Those of `answers` whose claim was found: some tokens are known to make it."""
        return np.array([i for i in answers if len(self.claim_rows(i))], dtype=np.int64)

    def ordinary(self, part: Part) -> IntArray:
        """Indices of the long answers to ordinary prompts."""
        return np.array(
            [
                i
                for i, label in enumerate(self.labels)
                if label.verdict == "ordinary" and self.part[self.first[i]] == part
            ],
            dtype=np.int64,
        )

    def rows_of(self, answer: int) -> IntArray:
        """All rows of an answer, in the order of its text."""
        return np.arange(self.first[answer], self.first[answer + 1])

    def claim_rows(self, answer: int) -> IntArray:
        """The rows of an answer's claim."""
        rows = self.rows_of(answer)
        return rows[np.isin(self.features.kind[rows], (Kind.RIGHT, Kind.WRONG))]

    def hallucinated(self, answers: IntArray) -> NDArray[np.bool_]:
        """[answers] labels."""
        return np.array([self.labels[i].hallucinated for i in answers], dtype=np.bool_)


def load_dataset(run: Path, split: Split | None = None) -> Dataset:
    """Join the files of a run, split as `label` was told or by another `split`, and those of the
    runs within it that `augment` made; RecordError when they do not belong together."""
    features, (_, answers, said, labels) = _load(run)
    data = join(features, answers, labels, split or Split.of(said))
    found = [name for name in AUGMENTED if (run / name / "labels.jsonl").exists()]
    units, parts = assign(answers, data.split) if found else ({}, {})
    home = {id.rsplit("/", 1)[0]: units[id] for id, part in parts.items() if part == "fit"}
    for name in found:
        features, (_, answers, said, labels) = _load(run / name)
        if said.get(OF) != data.features.header.labels_sha256:
            raise RecordError(
                f"{run / name} was made for other labels than {run} holds, or is not finished; "
                f"`augment` again, or delete it"
            )
        data = augmented(data, name, features, answers, labels, home)
    return data


def _load(run: Path) -> tuple[Features, Labelled]:
    features = load_features(run / "features")
    if features.header.labels_sha256 != sha256(run / "labels.jsonl"):
        raise RecordError(f"{run / 'features'} was made from other labels; run `extract` again")
    return features, read_labelled(run)


def join(
    features: Features,
    answers: Sequence[Answer],
    labels: Sequence[Label],
    split: Split,
) -> Dataset:
    """Rows with their answer, label and part. All answers are split, as `label` splits them: what
    gave no rows still counts among the groups of its source."""
    units, parts = assign(answers, split)
    return Dataset(
        features=features,
        answers=_of_features(features, answers),
        labels=_of_features(features, labels),
        part=np.array([parts[id] for id in features.ids])[features.answer],
        unit=np.array([units[id] for id in features.ids])[features.answer],
        first=_first_rows(features),
        split=split,
        own=len(features.ids),
        augmented={},
    )


def augmented(
    data: Dataset,
    name: str,
    features: Features,
    answers: Sequence[Answer],
    labels: Sequence[Label],
    home: Mapping[str, str],
) -> Dataset:
    """`data`, and more answers of its part "fit": those of units that it has answers of.

    home  question -> unit, of the part "fit"; what is asked elsewhere is excluded
    RecordError when the features were read otherwise than those of `data`.
    """
    features.header.check_alike(data.features.header, name)
    known = set(data.unit[data.part == "fit"].tolist())
    units = [home.get(answer.question_id, "") for answer in _of_features(features, answers)]
    parts: list[Part] = ["augmented" if unit in known else "excluded" for unit in units]
    return replace(
        data,
        features=data.features.followed_by(features),
        answers=(*data.answers, *_of_features(features, answers)),
        labels=(*data.labels, *_of_features(features, labels)),
        part=np.concatenate([data.part, np.array(parts)[features.answer]]),
        unit=np.concatenate([data.unit, np.array(units)[features.answer]]),
        first=np.concatenate([data.first, data.first[-1] + _first_rows(features)[1:]]),
        augmented=data.augmented | {name: features.header.labels_sha256},
    )


def _of_features(features: Features, records: Sequence[T]) -> tuple[T, ...]:
    """Those that the features have rows of, in their order."""
    by_id = {record.id: record for record in records}
    if missing := [id for id in features.ids if id not in by_id]:
        raise RecordError(f"features of {missing[0]!r} have no answer or label; extract again")
    return tuple(by_id[id] for id in features.ids)


def _first_rows(features: Features) -> IntArray:
    counts = np.bincount(features.answer, minlength=len(features.ids))
    if (np.diff(features.answer) < 0).any() or (counts == 0).any():
        raise RecordError("the rows of an answer must stand together; extract again")
    return np.concatenate([[0], np.cumsum(counts)])
