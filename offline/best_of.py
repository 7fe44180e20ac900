"""Best of n: several samples of one question, and what is gained by answering with the one that the
probe likes best, beside a majority vote and the log-probability.

The samples are a run within the run (`samples/`): answers, labels and features of their own, made
by the same verbs from questions of the test part.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from offline.baselines import whole_statistics
from offline.collect import PAPER, Sampling
from offline.dataset import Dataset, load_dataset
from offline.features import IntArray
from offline.fit_result import FitResult
from offline.metrics import mean_of_positives
from offline.mixtures import pooled
from offline.questions import Question, question_of, shuffle_key
from offline.records import Answer, Label, RecordError, read_labelled
from offline.splits import Split, assign
from offline.tables import table
from offline.words import words
from probes.card import EvaluationRow

FOLDER = "samples"
QUESTIONS = 100  # that are asked again
USABLE = 2  # judged samples, at least, of a question

Chooser: TypeAlias = Callable[[IntArray], int]  # samples of a question -> which is answered with


def sampling(samples: int, seed: int, max_tokens: int | None) -> Sampling:
    """The paper's way to draw."""
    return replace(PAPER, samples=samples, seed=seed, max_tokens=max_tokens)


def questions_again(
    answers: Sequence[Answer], labels: Sequence[Label], split: Split
) -> list[Question]:
    """Questions of the test part whose answer was judged; which ones, a hash decides."""
    _, parts = assign(answers, split)
    judged = {label.id for label in labels if label.verdict in ("right", "wrong", "mixed")}
    chosen = {
        answer.question_id: answer
        for answer in answers
        if answer.id in judged and parts[answer.id] == "test"
    }
    shuffled = sorted(chosen.items(), key=lambda pair: shuffle_key(pair[0]))
    return [question_of(answer) for _, answer in shuffled[:QUESTIONS]]


def best_of_rows(samples: Dataset, result: FitResult) -> Iterator[EvaluationRow]:
    """Accuracy over questions, of which USABLE samples at least were judged right or wrong."""
    every = np.arange(len(samples.answers))
    wrong = np.array([label.verdict == "wrong" for label in samples.labels])
    logits = result.chosen.logits(samples.features, np.arange(len(samples.part)))
    risk = pooled(samples, logits[:, result.response_head], every, result.pooling)
    surprise = whole_statistics(samples, every)
    by_question: dict[str, list[int]] = defaultdict(list)
    for i in range(len(every)):
        if samples.labels[i].verdict in ("right", "wrong"):
            by_question[samples.answers[i].question_id].append(i)
    asked = [
        np.array(sorted(indices, key=lambda i: samples.answers[i].id))
        for indices in by_question.values()
        if len(indices) >= USABLE
    ]
    if not asked:
        return
    texts = [" ".join(word.key for word in words(answer.text)) for answer in samples.answers]

    def voted(indices: IntArray) -> int:
        votes = Counter(texts[i] for i in indices)
        return int(max(indices, key=lambda i: votes[texts[i]]))

    choosers: dict[str, Chooser] = {
        "one sample": lambda indices: int(indices[0]),
        "majority vote": voted,
        "probe": lambda indices: int(indices[risk[indices].argmin()]),
        **{
            name: lambda indices, of=surprise[name]: int(indices[of[indices].argmin()])  # type: ignore[misc]
            for name in ("-logprob_sum", "-logprob_mean")
        },
        "ceiling: any right sample": lambda indices: int(indices[wrong[indices].argmin()]),
    }
    most = max(len(indices) for indices in asked)
    units = samples.unit[samples.first[[indices[0] for indices in asked]]]
    for name, choose in choosers.items():
        right = ~wrong[[choose(indices) for indices in asked]]
        yield from table(
            {"accuracy": mean_of_positives},
            f"best of {most} samples, unseen relations and questions",
            name,
            np.ones(len(asked), dtype=np.bool_),
            right.astype(np.float64),
            units,
        )


def load_samples(run: Path, data: Dataset) -> Dataset | None:
    """The run within the run, whose answers are `data`; None when it was not made. RecordError when
    its features were read otherwise, or when one of its questions is not of the test part."""
    folder = run / FOLDER
    if not (folder / "labels.jsonl").exists():
        return None
    samples = load_dataset(folder, Split(seed=data.split.seed))
    samples.features.header.check_alike(data.features.header, FOLDER)
    answers = read_labelled(run).answers
    _, parts = assign(answers, data.split)
    tested = {answer.question_id for answer in answers if parts[answer.id] == "test"}
    for answer in samples.answers:
        if answer.question_id not in tested:
            raise RecordError(
                f"{folder} holds samples of {answer.question_id!r}, which is not of the test part; "
                f"delete the folder and `resample`"
            )
    return samples
