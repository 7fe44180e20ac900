"""Verb `label`: which answers are hallucinated, and which of their tokens say so.

answers.jsonl -> labels.jsonl. An answer that cannot be used keeps its line with the reason, so that
every count of the funnel can be made again from the file.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from offline import answer_spans
from offline.judge import judge, usable_aliases
from offline.records import Answer, Header, Label, Verdict, read_records, sha256, write_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from offline.models import LoadedTokenizer

log = logging.getLogger(__name__)

ABSTAINED = "gives no answer"
NO_ALIAS = "every accepted answer stands in the question"
NO_SPAN = "no words that make the claim"
NOT_AGREED = "too few of the samples agree"
NOT_TYPICAL = "another sample stands for the question"
ROUND_TRIP = "token ids do not decode to the text"
SURPLUS = "more wrong answers than the group's right ones allow"


def label_answers(
    answers_path: Path,
    labels_path: Path,
    *,
    tokenizer: LoadedTokenizer,
    agree: int,
    wrong_per_right: float,
) -> Counter[str]:
    """Write `labels_path` and return the funnel: how many answers are used or dropped, and why.

    agree            so many samples of a question must be right, or wrong, for it to count
    wrong_per_right  so many wrong answers are kept per right one of the same group; 0 keeps all
    """
    header, answers = read_records(answers_path, Answer)
    tokenizer.check(header, answers_path)
    answers.sort(key=lambda answer: answer.id)  # they were written as they came
    labels = [label_one(answer, tokenizer.tokenizer) for answer in answers]
    labels = apply_agreement(answers, labels, agree)
    if wrong_per_right:
        labels = balance(answers, labels, wrong_per_right)
    settings = {
        "answers_sha256": sha256(answers_path),
        "judge": "whole-word alias match",
        "agree": str(agree),
        "wrong_per_right": str(wrong_per_right),
    }
    write_records(labels_path, _labels_header(header, settings), labels)
    funnel = Counter(label.dropped or f"used: {label.verdict}" for label in labels)
    for reason, count in funnel.most_common():
        log.info("%6d  %s", count, reason)
    return funnel


def label_one(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> Label:
    """One answer by itself: verdict, claim and tokens."""
    offsets = answer_spans.token_offsets(tokenizer, answer.token_ids)
    if answer_spans.decode(tokenizer, answer.token_ids) != answer.text:
        return _dropped(answer, "abstained", ROUND_TRIP)
    if not answer.gold:
        written = tuple(i for i, (start, stop) in enumerate(offsets) if start < stop)
        return Label(
            id=answer.id, verdict="ordinary", span=(), tokens=(), others=written, dropped=""
        )
    aliases = usable_aliases(answer.gold, answer.question)
    if not aliases:
        return _dropped(answer, "abstained", NO_ALIAS)
    verdict = judge(answer.text, aliases)
    if verdict == "abstained":
        return _dropped(answer, "abstained", ABSTAINED)
    located = (
        answer_spans.locate_right(answer.text, aliases)
        if verdict == "right"
        else answer_spans.locate_wrong(answer.text, answer.question, answer.gold)
    )
    if located is None:
        return _dropped(answer, verdict, NO_SPAN)
    tokens = answer_spans.overlapping(offsets, located.spans)
    around = answer_spans.scaffold(answer.text, answer.question, located)
    closing = answer_spans.closing(offsets, answer.text, located)
    others = {*answer_spans.overlapping(offsets, around), *closing} - set(tokens)
    return Label(
        id=answer.id,
        verdict=verdict,
        span=located.spans,
        tokens=tokens,
        others=tuple(sorted(others)),
        dropped="",
    )


def apply_agreement(answers: Sequence[Answer], labels: Sequence[Label], agree: int) -> list[Label]:
    """Keep a question when `agree` of its samples share a verdict; its commonest text stands.

    The paper asks for ten of ten; a small model is never ten times right, so k is a parameter.
    """
    by_question: dict[str, list[int]] = defaultdict(list)
    for i, answer in enumerate(answers):
        by_question[answer.question_id].append(i)
    kept = list(labels)
    for indices in by_question.values():
        if labels[indices[0]].verdict == "ordinary":
            continue
        verdicts = Counter(labels[i].verdict for i in indices)
        verdict, votes = max(
            (("right", verdicts["right"]), ("wrong", verdicts["wrong"])), key=lambda pair: pair[1]
        )
        usable = [i for i in indices if not labels[i].dropped and labels[i].verdict == verdict]
        texts = Counter(answers[i].text for i in usable)
        typical = max(usable, key=lambda i: (texts[answers[i].text], -i)) if usable else None
        for i in indices:
            if labels[i].dropped:
                continue
            if votes < agree:
                kept[i] = _with_reason(labels[i], NOT_AGREED, verdict="mixed")
            elif i != typical:
                kept[i] = _with_reason(labels[i], NOT_TYPICAL)
    return kept


def balance(
    answers: Sequence[Answer], labels: Sequence[Label], wrong_per_right: float
) -> list[Label]:
    """At most `wrong_per_right` wrong answers per right one within each source, style and group.

    Without this a probe learns which groups the model is bad at instead of when it is wrong.
    """
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for i, answer in enumerate(answers):
        if not labels[i].dropped and labels[i].verdict in ("right", "wrong"):
            groups[answer.source, answer.style, answer.group].append(i)
    kept = list(labels)
    for indices in groups.values():
        right = sum(not labels[i].hallucinated for i in indices)
        wrong = [i for i in indices if labels[i].hallucinated]
        wrong.sort(key=lambda i: hashlib.sha256(labels[i].id.encode()).hexdigest())
        for i in wrong[round(right * wrong_per_right) :]:
            kept[i] = _with_reason(labels[i], SURPLUS)
    return kept


def used(labels: Iterable[Label]) -> list[Label]:
    """The labels that later verbs work on."""
    return [label for label in labels if not label.dropped]


def _dropped(answer: Answer, verdict: Verdict, reason: str) -> Label:
    return Label(id=answer.id, verdict=verdict, span=(), tokens=(), others=(), dropped=reason)


def _with_reason(label: Label, reason: str, verdict: Verdict | None = None) -> Label:
    return msgspec.structs.replace(label, dropped=reason, verdict=verdict or label.verdict)


def _labels_header(answers: Header, settings: dict[str, str]) -> Header:
    return msgspec.structs.replace(answers, kind="labels", settings=settings)
