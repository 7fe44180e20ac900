"""Verb `label`: which answers are hallucinated, and which of their tokens say so.

answers.jsonl -> labels.jsonl. An answer that cannot be used keeps its line with the reason, so that
every count of the funnel can be made again from the file.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from offline import answer_spans
from offline.answer_spans import CharSpan, Located
from offline.ask_model import Asked, LanguageModelJudge, claims
from offline.choice import WRONG_PER_RIGHT, apply_agreement, balance
from offline.evasion import first_sentence
from offline.judge import RULES, Case, Judge, Judgement, RuleJudge, usable_aliases
from offline.judge_by_inference import InferenceJudge
from offline.records import (
    Answer,
    Label,
    RecordError,
    Verdict,
    read_records,
    sha256,
    write_records,
)
from offline.splits import SPLIT_SEED, Split, assign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from offline.models import LoadedTokenizer

log = logging.getLogger(__name__)

CUT_OFF = "is cut off before it claims anything"
ROUND_TRIP = "token ids do not decode to the text"
JUDGES = (*RULES, "llm", "nli")
SPANS = ("rule", "llm")


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """How answers are judged and which of them are kept."""

    judge: str = "alias"  # one of JUDGES
    spans: str = "rule"  # one of SPANS: how the words of a claim are found
    judge_url: str | None = None  # server of `llm`
    judge_model: str | None = None  # as `judge_url` names it; for `nli` a hub id or folder
    in_flight: int = 32
    agree: int = 1  # so many samples of a question must be right, or wrong, for it to count
    wrong_per_right: float = (
        WRONG_PER_RIGHT  # so many wrong answers are kept per right one; 0 keeps all
    )
    right_per_wrong: float = 0.0
    split_seed: int = SPLIT_SEED  # see `spare`
    transfer: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value, known in (("judge", self.judge, JUDGES), ("spans", self.spans, SPANS)):
            if value not in known:
                raise RecordError(f"--{name} {value!r} is not one of {', '.join(known)}")
        asks = "llm" in (self.judge, self.spans)
        if asks and not (self.judge_url and self.judge_model):
            raise RecordError("a judge or spans of llm need --judge-url and --judge-model")
        if self.judge_url and not asks:
            raise RecordError("--judge-url is asked by --judge llm or --spans llm alone; give one")
        if self.judge_model and not asks and self.judge != "nli":
            raise RecordError(
                "--judge-model is of --judge llm, --judge nli or --spans llm; give one"
            )
        if self.judge == "nli" and not self.judge_model:
            raise RecordError("--judge nli needs --judge-model, an inference model or its folder")
        if self.judge == "nli" and self.spans == "llm":
            raise RecordError("--judge nli and --spans llm would need two models; choose one")


PAPER = LabelSettings(agree=10, wrong_per_right=1.0, right_per_wrong=1.0)


def label_answers(
    answers_path: Path,
    labels_path: Path,
    *,
    tokenizer: LoadedTokenizer,
    settings: LabelSettings,
    api_key: str | None = None,
) -> Counter[str]:
    """Write `labels_path` and return the funnel: how many answers are used or dropped, and why.

    RecordError when no right or no wrong answer is left; the file then says why for each answer.
    """
    header, answers = read_records(answers_path, Answer)
    tokenizer.check(header, answers_path)
    answers.sort(key=lambda answer: answer.id)  # as they came, when `collect` was not finished
    asked = Asked(
        base_url=settings.judge_url or "",
        model=settings.judge_model or "",
        folder=labels_path.parent / "replies",
        header=header,
        in_flight=settings.in_flight,
        api_key=api_key,
    )
    judge = make_judge(settings, asked)
    judged = _judged(answers, judge)
    located = (
        _located_by_model(answers, judged, asked)
        if settings.spans == "llm"
        else {a.id: locate(a, judged[a.id].verdict) for a in answers if a.id in judged}
    )
    labels = [
        label_one(a, tokenizer.tokenizer, judged.get(a.id), located.get(a.id)) for a in answers
    ]
    labels = apply_agreement(answers, labels, settings.agree)
    balanced = balance(
        answers,
        labels,
        wrong_per_right=settings.wrong_per_right,
        right_per_wrong=settings.right_per_wrong,
    )
    labels = spare(answers, labels, balanced, settings)
    said = {
        "answers_sha256": sha256(answers_path),
        "judge": judge.name,
        "spans": "rule" if settings.spans == "rule" else f"language model {settings.judge_model}",
        "agree": str(settings.agree),
        "wrong_per_right": str(settings.wrong_per_right),
        "right_per_wrong": str(settings.right_per_wrong),
        "split_seed": str(settings.split_seed),
        "transfer": ",".join(settings.transfer),
    }
    write_records(
        labels_path, msgspec.structs.replace(header, kind="labels", settings=said), labels
    )
    return _funnel(labels, labels_path)


def spare(
    answers: Sequence[Answer],
    before: Sequence[Label],
    balanced: Sequence[Label],
    settings: LabelSettings,
) -> list[Label]:
    """Balanced where a probe is fitted; all that was asked where it is judged, since people do not
    ask in balance either."""
    split = Split(frozenset(settings.transfer), settings.split_seed)
    _, parts = assign(answers, split)
    return [
        after if parts[answer.id] == "fit" else label
        for answer, label, after in zip(answers, before, balanced, strict=True)
    ]


def label_settings(paper: bool, **given: str | float | tuple[str, ...] | None) -> LabelSettings:
    """The paper's rule or this project's, with what is `given` put in its place."""
    said = {key: value for key, value in given.items() if value is not None}
    return replace(PAPER if paper else LabelSettings(), **said)  # type: ignore[arg-type]


def make_judge(settings: LabelSettings, asked: Asked) -> Judge:
    """The judge that `settings` name."""
    if settings.judge == "llm":
        return LanguageModelJudge(asked)
    if settings.judge == "nli":
        return InferenceJudge(asked.model, folder=asked.folder, header=asked.header)
    return RuleJudge(settings.judge)


def label_one(
    answer: Answer,
    tokenizer: PreTrainedTokenizerBase,
    judgement: Judgement | None,
    located: Located | None,
) -> Label:
    """One answer by itself: verdict, claim and tokens.

    judgement  None for an answer to an ordinary prompt, which has nothing to be judged by
    located    None when the claim is not found; the answer then counts as a whole only
    """
    if answer_spans.decode(tokenizer, answer.token_ids) != answer.text:
        return _label(answer, "unjudged", dropped=ROUND_TRIP)
    offsets = answer_spans.token_offsets(tokenizer, answer.token_ids)
    if judgement is None:
        written = tuple(i for i, (start, stop) in enumerate(offsets) if start < stop)
        return _label(answer, "ordinary", others=written)
    if judgement.verdict not in ("right", "wrong"):
        return _label(answer, judgement.verdict, dropped=judgement.reason)
    if located is None:
        return _label(answer, judgement.verdict)
    tokens = answer_spans.overlapping(offsets, located.spans)
    around = answer_spans.scaffold(answer.text, answer.question, located)
    closing = answer_spans.closing(offsets, answer.text, located)
    others = {*answer_spans.overlapping(offsets, around), *closing} - set(tokens)
    return _label(
        answer,
        judgement.verdict,
        span=located.spans,
        tokens=tokens,
        others=tuple(sorted(others)),
    )


def locate(answer: Answer, verdict: Verdict) -> Located | None:
    """By rule: the accepted answer in a right one where it stands there; else what the question did
    not give. A claim at which the text was cut off may be half of one, and is none."""
    aliases = usable_aliases(answer.gold, answer.question)
    right = answer_spans.locate_right(answer.text, aliases) if verdict == "right" else None
    found = right or answer_spans.locate_wrong(answer.text, answer.question, answer.gold)
    return found and unless_half(answer, found)


def unless_half(answer: Answer, found: Located) -> Located | None:
    """`found`, but None when the limit of tokens ended the text where the claim ends."""
    is_cut = answer.finish_reason == "length" and found.judged_until == len(answer.text)
    return None if is_cut else found


def used(labels: Iterable[Label]) -> list[Label]:
    """The labels that later verbs work on."""
    return [label for label in labels if not label.dropped]


def _judged(answers: Sequence[Answer], judge: Judge) -> dict[str, Judgement]:
    """Judgements of the answers that have accepted answers."""
    asked = [answer for answer in answers if answer.gold]
    said = judge.judge([Case(a.id, a.question, a.gold, a.text) for a in asked])
    return {a.id: unless_cut_off(a, verdict) for a, verdict in zip(asked, said, strict=True)}


def unless_cut_off(answer: Answer, said: Judgement) -> Judgement:
    """What a sentence would have claimed is not known when the limit of tokens ended it first."""
    is_open = first_sentence(answer.text) == answer.text and answer.finish_reason == "length"
    if said.verdict == "wrong" and is_open and locate(answer, "wrong") is None:
        return Judgement("unjudged", CUT_OFF)
    return said


def _located_by_model(
    answers: Sequence[Answer], judged: dict[str, Judgement], asked: Asked
) -> dict[str, Located | None]:
    """Claims of the right and wrong answers as a model finds them. Where it finds none the rules do
    not step in: a file has one way to find claims."""
    chosen = [a for a in answers if a.id in judged and judged[a.id].verdict in ("right", "wrong")]
    found = claims(asked, [(a.question, a.text) for a in chosen])
    return {
        a.id: unless_half(a, Located((span,), span[1])) if span else None
        for a, span in zip(chosen, found, strict=True)
    }


def _funnel(labels: Sequence[Label], path: Path) -> Counter[str]:
    funnel = Counter(label.dropped or f"used: {label.verdict}" for label in labels)
    whole = sum(not label.tokens and label.verdict in ("right", "wrong") for label in used(labels))
    log.info("%6d  of the used ones count as a whole only: no words make their claim", whole)
    for reason, count in funnel.most_common():
        log.info("%6d  %s", count, reason)
    for verdict in ("right", "wrong"):
        if not funnel[f"used: {verdict}"]:
            counts = "; ".join(f"{count} {reason}" for reason, count in funnel.most_common())
            raise RecordError(
                f"no {verdict} answer is left, and a probe needs both ({counts}); {path} says why "
                f"for each; ask more or other questions, or lower --agree"
            )
    return funnel


def _label(
    answer: Answer,
    verdict: Verdict,
    *,
    span: tuple[CharSpan, ...] = (),
    tokens: tuple[int, ...] = (),
    others: tuple[int, ...] = (),
    dropped: str = "",
) -> Label:
    return Label(
        id=answer.id, verdict=verdict, span=span, tokens=tokens, others=others, dropped=dropped
    )
