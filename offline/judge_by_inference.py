"""A judge that needs no server: natural language inference by a sequence classifier.

Premise: the question with the answer that was given. Hypothesis: the question with an accepted
answer. Entailed by any of them is right, contradicted by all is wrong, anything else is undecided.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec
from tqdm import tqdm

from offline.evasion import refuses
from offline.judge import ABSTAINED, Case, Judgement
from offline.models import digest_of_files
from offline.records import Header, Verdict
from offline.replies import Replies, reply
from probes.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

UNDECIDED = "the premise neither entails nor contradicts"
PAIRS_PER_PASS = 32
_NAMES = {
    "entailment": ("entailment", "entail"),
    "contradiction": ("contradiction", "contradict", "not_entailment"),
}


class InferenceJudge:
    """`model` is a hub id (`ID@REVISION` pins it) or a folder; no code of a repository runs.

    Verdicts are kept in `folder` as they come, under the header of the answers.
    """

    def __init__(self, model: str, *, folder: Path, header: Header) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        id, _, revision = model.partition("@")
        revision = revision or "main"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(id, revision=revision)
            self._model = AutoModelForSequenceClassification.from_pretrained(
                id, revision=revision, use_safetensors=True
            ).eval()
        except (OSError, ValueError) as exc:
            raise ModelError(f"no sequence classifier in {model!r}: {exc}") from exc
        names = {name.casefold(): i for i, name in self._model.config.id2label.items()}
        self._entailed = _column(names, "entailment", model)
        self._contradicted = _column(names, "contradiction", model)
        if torch.cuda.is_available():
            self._model.to("cuda")
        weights = digest_of_files(Path(id)) if Path(id).is_dir() else revision
        self.name = f"inference by {id.rstrip('/').rpartition('/')[2]}@{revision}"
        self._kept = Replies(folder, "inference", header, model=self.name, weights=weights)

    def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        """Refusals are found by rule: they would contradict everything."""
        keys = [msgspec.json.encode(case[1:]).decode() for case in cases]
        asked = {key: case for key, case in zip(keys, cases, strict=True) if not refuses(case.text)}
        with self._kept.appender() as out:
            for key in tqdm(self._kept.missing(list(asked)), unit="answer", desc="judge"):
                out.append(reply(key, self._verdict(asked[key])))
        verdicts = dict(zip(asked, self._kept.of(list(asked)), strict=True))
        return [
            _judgement(verdicts[key]) if key in verdicts else Judgement("abstained", ABSTAINED)
            for key in keys
        ]

    def _verdict(self, case: Case) -> Verdict:
        """Whichever class has the largest probability, over all accepted answers."""
        likely = self._probabilities(
            f"{case.question} {case.text}", [f"{case.question} {gold}" for gold in case.gold]
        ).argmax(-1)
        if bool((likely == self._entailed).any()):
            return "right"
        return "wrong" if bool((likely == self._contradicted).all()) else "unjudged"

    def _probabilities(self, premise: str, hypotheses: Sequence[str]) -> Tensor:
        """[hypotheses, classes] float32 on the CPU."""
        import torch

        rows = []
        for start in range(0, len(hypotheses), PAIRS_PER_PASS):
            batch = list(hypotheses[start : start + PAIRS_PER_PASS])
            encoded = self._tokenizer(
                [premise] * len(batch),
                batch,
                padding=True,
                truncation="only_first",  # the accepted answer is never cut
                return_tensors="pt",
            ).to(self._model.device)
            with torch.inference_mode():
                rows.append(self._model(**encoded).logits.float().softmax(-1).cpu())
        return torch.cat(rows)


def _judgement(verdict: str) -> Judgement:
    return Judgement(cast(Verdict, verdict), UNDECIDED if verdict == "unjudged" else "")


def _column(names: dict[str, int], wanted: str, model: str) -> int:
    for name in _NAMES[wanted]:
        if name in names:
            return names[name]
    raise ModelError(
        f"{model!r} is no inference model: none of its classes ({', '.join(names)}) is {wanted}"
    )
