"""Which judged answers are kept: samples of a question must agree, groups must be balanced.

An answer that is not kept keeps its label with the reason. Knows nothing of texts or tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

import msgspec

from offline.records import Answer, Label, RecordError, Verdict

NOT_AGREED = "too few of the samples agree"
NOT_TYPICAL = "another sample stands for the question"
WRONG_PER_RIGHT = 3.0  # of a source: what answers are fitted on
WRONG_PER_RIGHT_OF_GROUP = 1.5  # what tokens are fitted on, and all risks calibrated
SURPLUS = "more than the other answers of the group allow"


def apply_agreement(answers: Sequence[Answer], labels: Sequence[Label], agree: int) -> list[Label]:
    """Keep a question when `agree` of its samples are right and fewer wrong, or the reverse; the
    commonest text stands for it.

    The paper asks for ten of ten; a small model is never ten times right, so k is a parameter.
    RecordError when a question has fewer samples than must agree. 0: each sample stands for itself.
    """
    if not agree:
        return list(labels)
    by_question: dict[str, list[int]] = defaultdict(list)
    for i, answer in enumerate(answers):
        by_question[answer.question_id].append(i)
    kept = list(labels)
    for question, indices in by_question.items():
        if labels[indices[0]].verdict == "ordinary":
            continue
        if len(indices) < agree:
            raise RecordError(
                f"question {question!r} has {len(indices)} sample(s), fewer than the {agree} that "
                f"must agree; collect with --samples {agree} or more, or lower --agree"
            )
        verdicts = Counter(labels[i].verdict for i in indices)
        most = max(verdicts["right"], verdicts["wrong"])
        agreed = most >= agree and verdicts["right"] != verdicts["wrong"]
        verdict = "right" if verdicts["right"] == most else "wrong"
        usable = [i for i in indices if not labels[i].dropped and labels[i].verdict == verdict]
        texts = Counter(answers[i].text for i in usable)
        typical = max(usable, key=lambda i: (texts[answers[i].text], -i)) if usable else None
        for i in indices:
            if labels[i].dropped:
                continue
            if not agreed:
                kept[i] = _with_reason(labels[i], NOT_AGREED, verdict="mixed")
            elif i != typical:
                kept[i] = _with_reason(labels[i], NOT_TYPICAL)
    return kept


def balance(
    answers: Sequence[Answer],
    labels: Sequence[Label],
    *,
    wrong_per_right: float,
    right_per_wrong: float,
    inside_groups: bool = False,
) -> list[Label]:
    """At most so many wrong answers per right one, and right per wrong one, within each source and
    style; 0 keeps all. Drawn from all groups alike, so that each keeps its own share of wrong ones.

    `inside_groups`: within each group too; then nothing is earned by telling groups apart.
    """
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for i, answer in enumerate(answers):
        if not labels[i].dropped and labels[i].verdict in ("right", "wrong"):
            group = answer.group if inside_groups else ""
            groups[answer.source, answer.style, group].append(i)
    kept = list(labels)
    for indices in groups.values():
        right = _shuffled([i for i in indices if not labels[i].hallucinated], labels)
        wrong = _shuffled([i for i in indices if labels[i].hallucinated], labels)
        surplus = wrong[round(len(right) * wrong_per_right) :] if wrong_per_right else []
        surplus += right[round(len(wrong) * right_per_wrong) :] if right_per_wrong else []
        for i in surplus:
            kept[i] = _with_reason(labels[i], SURPLUS)
    return kept


def _shuffled(indices: list[int], labels: Sequence[Label]) -> list[int]:
    """An order that tells nothing and is always the same."""
    return sorted(indices, key=lambda i: hashlib.sha256(labels[i].id.encode()).hexdigest())


def _with_reason(label: Label, reason: str, verdict: Verdict | None = None) -> Label:
    return msgspec.structs.replace(label, dropped=reason, verdict=verdict or label.verdict)
