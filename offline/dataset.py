"""Features joined with their labels and split: what `fit` and `evaluate` work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offline.choice import WRONG_PER_RIGHT_OF_GROUP, balance
from offline.features import Features, IntArray, load_features
from offline.records import Answer, Label, RecordError, read_labelled, sha256
from offline.shards import Kind
from offline.splits import Part, Split, assign

Names = NDArray[np.str_]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows are tokens, in the order of `features`; answers are those of `features.ids`.

    part, unit [rows]: a unit (relation or question) lies in one part only. first [answers + 1]:
    the rows of answer i are `first[i] .. first[i + 1] - 1`, in the order of the text.
    """

    features: Features
    answers: tuple[Answer, ...]
    labels: tuple[Label, ...]
    part: Names
    unit: Names
    first: IntArray
    split: Split

    def even_rows(self, part: Part, *kinds: Kind) -> IntArray:
        """Rows of `even` answers of a part whose token is of one of `kinds`."""
        answers = self.even(self.answered(part))
        rows = self.rows(part, *kinds)
        return rows[np.isin(self.features.answer[rows], answers)]

    def rows(self, part: Part, *kinds: Kind) -> IntArray:
        """Rows of a part whose token is of one of `kinds`."""
        chosen = (self.part == part) & np.isin(self.features.kind, kinds)
        return np.flatnonzero(chosen)

    def answered(self, part: Part, *, source: str = "", style: str = "") -> IntArray:
        """Indices of the right and wrong answers of a part (and source, style when given)."""
        return np.array(
            [
                i
                for i, (answer, label) in enumerate(zip(self.answers, self.labels, strict=True))
                if label.verdict in ("right", "wrong")
                and self.part[self.first[i]] == part
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
    """Join the files of a run, split as `label` was told or by another `split`; RecordError when
    they do not belong together."""
    features = load_features(run / "features")
    if features.header.labels_sha256 != sha256(run / "labels.jsonl"):
        raise RecordError(f"{run / 'features'} was made from other labels; run `extract` again")
    _, answers, said, labels = read_labelled(run)
    return join(features, answers, labels, split or Split.of(said))


def join(
    features: Features,
    answers: Sequence[Answer],
    labels: Sequence[Label],
    split: Split,
) -> Dataset:
    """Rows with their answer, label and part. All answers are split, as `label` splits them: what
    gave no rows still counts among the groups of its source."""
    answer_of = {answer.id: answer for answer in answers}
    label_of = {label.id: label for label in labels}
    missing = [id for id in features.ids if id not in answer_of or id not in label_of]
    if missing:
        raise RecordError(f"features of {missing[0]!r} have no answer or label; extract again")
    kept = tuple(answer_of[id] for id in features.ids)
    units, parts = assign(answers, split)
    counts = np.bincount(features.answer, minlength=len(kept))
    if (np.diff(features.answer) < 0).any() or (counts == 0).any():
        raise RecordError("the rows of an answer must stand together; extract again")
    return Dataset(
        features=features,
        answers=kept,
        labels=tuple(label_of[id] for id in features.ids),
        part=np.array([parts[id] for id in features.ids])[features.answer],
        unit=np.array([units[id] for id in features.ids])[features.answer],
        first=np.concatenate([[0], np.cumsum(counts)]),
        split=split,
    )
