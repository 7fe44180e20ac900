"""Verb `publish`: the folder that a server loads: probe.json, probe.safetensors and README.md.

The known answers are read here by the same Meter that serves, and the folder is loaded again and
checked before it counts as made.
"""

from __future__ import annotations

import datetime
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from torch import Tensor

from offline.augment import is_told
from offline.calibrate import reference_risks
from offline.card import readme
from offline.caveats import not_good_for
from offline.dataset import Dataset
from offline.evaluate import Evaluation
from offline.fit_result import TOKEN, FitResult
from offline.hub import front_matter
from offline.mixtures import mixture, response_mixture
from offline.models import LoadedModel
from offline.records import (
    Answer,
    Label,
    RecordError,
    read_records,
    sha256,
    versions,
)
from offline.shards import Kind
from offline.splits import TEST_SHARE
from probes import known_answer
from probes.card import SCHEMA_VERSION, ProbeCard, ResponseRule, TokenRule
from probes.cett import FORMULA_VERSION
from probes.fingerprint import match
from probes.neurons import FFN, find_ffns
from probes.probe import Probe
from probes.tap import Meter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

KNOWN_ANSWERS = 3


def publish(
    folder: Path,
    *,
    name: str,
    result: FitResult,
    evaluation: Evaluation,
    data: Dataset,
    loaded: LoadedModel,
    training: dict[str, str],
) -> Probe:
    """Write the new folder; RecordError when model, features, fit and evaluation do not belong
    together.

    `training` goes into the card as it is: data digests, labels, command, for people.
    """
    if loaded.identity != result.features.model:
        raise RecordError("the features were extracted from another model; extract and fit again")
    result.check(data)
    evaluation.check(result)
    ffns = find_ffns(loaded.model)
    card = ProbeCard(
        schema_version=SCHEMA_VERSION,
        formula_version=FORMULA_VERSION,
        name=name,
        position=result.features.position,
        heads=result.chosen.heads,
        token=TokenRule(
            head=TOKEN,
            calibration=result.token,
            span=result.span,
            operating_points=result.token_points,
            default=result.settings.token_default,
            reference=reference_risks(
                result.token, result.chosen.logits(data.features, mixture(data, "test"))[:, 0]
            ),
        ),
        response=ResponseRule(
            head=result.chosen.heads[result.response_head],
            pooling=result.pooling,
            calibration=result.response,
            operating_points=result.response_points,
            default=result.settings.response_default,
        ),
        model=loaded.identity,
        training=training,
        evaluation=evaluation.rows,
        reliability=evaluation.reliability,
        not_good_for=not_good_for(training["judge"], result.pooling),
        libraries=versions(),
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        tensors_sha256="",
        known_answers=(),
    )
    examples = [_ids(answer) for answer in _examples(data)]
    probe = with_known_answers(make_probe(card, result, ffns), loaded.model, ffns, examples)
    if not _is_there(folder, probe):
        probe.save(folder, readme=front_matter(probe.card) + readme(probe.card, probe.id))
    written = Probe.load(folder)
    match(written, loaded.identity)
    log.info("%s: %d neurons in %s", written.id, len(written.layer), folder)
    return written


def _is_there(folder: Path, probe: Probe) -> bool:
    """The folder holds this very probe: a run that was finished, or killed just then, is repeated.
    RecordError when it holds another."""
    if not folder.exists():
        return False
    found, made = _lasting(Probe.load(folder).card), _lasting(probe.card)
    differs = [name for name in found if found[name] != made[name]]
    if differs:
        raise RecordError(
            f"{folder} holds another probe (other {', '.join(differs)}); choose a new folder with "
            f"--to"
        )
    return True


def _lasting(card: ProbeCard) -> dict[str, object]:
    """A card without when and by which of several commands it was written."""
    training = {key: value for key, value in card.training.items() if key != "command"}
    same = msgspec.structs.replace(card, created="", training=training)
    return {name: getattr(same, name) for name in same.__struct_fields__}


def training_facts(run: Path, result: FitResult, data: Dataset) -> dict[str, str]:
    """What the probe was made from, in words: conditions that every figure of the card has."""
    header, _ = read_records(run / "answers.jsonl", Answer)
    labels, _ = read_records(run / "labels.jsonl", Label)
    sampling = header.settings
    facts = {
        "neurons": str(len(result.chosen.columns)),
        "sources": ", ".join(sorted({answer.source for answer in data.answers})),
        "answers": f"{sampling['samples']} per question, temperature {sampling['temperature']}, "
        f"top_p {sampling['top_p']}, top_k {sampling['top_k']}",
        "judge": f"{labels.settings['judge']}; {labels.settings['agree']} sample(s) agree; at most "
        f"{labels.settings['wrong_per_right']} wrong answers per right one of a source and style",
        "design": result.settings.design,
        "fitted on": ", ".join(f"{n} {kind}" for kind, n in result.examples.items()),
        "split": f"by relation where a source has ten or more, else by question: {TEST_SHARE:.0%} "
        f"for the test by a hash of the name, seed {result.settings.seed}; all else was fitted on "
        f"in {result.settings.folds} folds, whose held-out logits chose and calibrated",
        "chosen": _chosen(result),
        "found again": _found_again(result),
        "answers_sha256": sha256(run / "answers.jsonl"),
        "labels_sha256": sha256(run / "labels.jsonl"),
    }
    if data.augmented:
        facts["augmented by"] = _augmented_by(data)
        facts |= {f"{name}, labels_sha256": digest for name, digest in data.augmented.items()}
    tokens = data.features.kind[mixture(data, "fit")] == Kind.WRONG
    responses = response_mixture(data, "fit")[1]
    facts["calibrated on"] = (
        f"{len(tokens)} tokens, {tokens.mean():.0%} of them of wrong claims (short answers and as "
        f"many tokens of ordinary long ones); {len(responses)} responses, {responses.mean():.0%} "
        f"of them wrong (short answers and ordinary long ones); by the logits of probes that had "
        f"not seen them"
    )
    units = data.unit[data.first[data.answered("test")]].tolist()
    relations = sorted({unit for unit in units if "/" in unit})  # a question has lost its "/"
    facts["relations of the test part"] = "; ".join(relations)
    for part in ("fit", "test", "transfer"):
        answered = data.answered(part)
        wrong = int(data.hallucinated(answered).sum())
        facts[f"answers, {part}"] = (
            f"{len(answered) - wrong} right, {wrong} wrong, {len(data.ordinary(part))} ordinary"
        )
    return facts


def _augmented_by(data: Dataset) -> str:
    """Of what only the answer head, and its rivals, are fitted on besides."""
    counts: Counter[str] = Counter()
    for i in data.answered("augmented"):
        kind = "told" if is_told(data.answers[i]) else "sampled"
        counts[f"{kind} {data.labels[i].verdict}"] += 1
    return (
        f"of questions of the fit part, for the answer head alone: {counts['sampled right']} right "
        f"and {counts['sampled wrong']} wrong further samples; {counts['told right']} right and "
        f"{counts['told wrong']} wrong statements that nobody sampled"
    )


def _chosen(result: FitResult) -> str:
    settings, neurons = result.settings, len(result.chosen.columns)
    if settings.design != "tokens":
        return f"nothing: {neurons} neurons are what L1 on raw CETT at C = {settings.c:g} leaves"
    return (
        f"{neurons} neurons within {settings.max_neurons}, the fewest within one standard error of "
        "the best; L2 penalty "
        + ", ".join(f"{value:g} ({head})" for head, value in result.penalty.items())
    )


def _found_again(result: FitResult) -> str:
    shares = result.found_in
    if not shares:
        return "not known"
    return (
        f"in {result.settings.resamples} fits on a random half of the relations and questions "
        f"each: {sum(share >= 0.9 for share in shares)} of the neurons in nine of ten, "
        f"{sum(share <= 0.1 for share in shares)} in one of ten or none; half of them in "
        f"{np.median(shares):.0%} or more"
    )


def make_probe(card: ProbeCard, result: FitResult, ffns: tuple[FFN, ...]) -> Probe:
    """The chosen candidate as a probe."""
    layer, neuron = np.divmod(np.array(result.chosen.columns), card.model.intermediate_size)
    norms = torch.stack([ffn.column_norms().cpu() for ffn in ffns])
    return Probe.make(
        card,
        layer=layer,
        neuron=neuron,
        weight=np.array(result.chosen.weight),
        column_norm=norms[layer, neuron].numpy(),
        bias=np.array(result.chosen.bias),
    )


def with_known_answers(
    probe: Probe,
    model: PreTrainedModel,
    ffns: tuple[FFN, ...],
    sequences: Sequence[tuple[int, ...]],
) -> Probe:
    """The probe with the logits that the Meter reads now for `sequences` of token ids."""
    with Meter(ffns, [probe], suppression=False) as meter:

        @torch.inference_mode()
        def read(token_ids: tuple[int, ...]) -> list[list[float]]:
            meter.begin(batch=1)
            model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False)
            logits: Tensor = meter.logits()
            rows: list[list[float]] = logits[0].tolist()
            return rows

        answers = known_answer.build(sequences, read)
    card = msgspec.structs.replace(probe.card, known_answers=answers)
    return Probe(
        card=card,
        layer=probe.layer,
        neuron=probe.neuron,
        weight=probe.weight,
        column_norm=probe.column_norm,
        suppress=probe.suppress,
        bias=probe.bias,
    )


def _examples(data: Dataset) -> list[Answer]:
    """The shortest right, wrong and ordinary answers of the test part."""
    answered = data.answered("test")
    wrong = data.hallucinated(answered)
    kinds = (answered[wrong], answered[~wrong], data.ordinary("test"))
    return [
        min((data.answers[i] for i in kind), key=lambda a: (len(_ids(a)), a.id))
        for kind in kinds[:KNOWN_ANSWERS]
        if len(kind)
    ]


def _ids(answer: Answer) -> tuple[int, ...]:
    return answer.prompt_token_ids + answer.token_ids
