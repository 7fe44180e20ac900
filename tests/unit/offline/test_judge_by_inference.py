"""A local inference model as judge, on a tiny random one whose bias decides what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from offline.judge import ABSTAINED, Case
from offline.judge_by_inference import UNDECIDED, InferenceJudge
from offline.records import Header
from probes.errors import ModelError

WORDS = "[PAD] [UNK] [CLS] [SEP] where ? rome oslo lima it is a the in".split()  # noqa: SIM905
CLASSES = ("contradiction", "entailment", "neutral")
CASE = Case("set/ask/q1/0", "Where?", ("Rome", "Lima"), "It is in Oslo")


def _save(folder: Path, says: str | None, classes: tuple[str, ...] = CLASSES) -> str:
    """A folder with a random classifier; `says` is the class that its bias prefers."""
    pieces = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]", model_max_length=24
    ).save_pretrained(folder)
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=24,
            initializer_range=0.4,  # else all classes are equally likely
            id2label=dict(enumerate(classes)),
            label2id={name: i for i, name in enumerate(classes)},
        )
    )
    if says is not None:
        with torch.no_grad():
            model.classifier.bias[classes.index(says)] += 50.0
    model.save_pretrained(folder)
    return str(folder)


def _judge(folder: str, tmp_path: Path, header: Header) -> InferenceJudge:
    return InferenceJudge(folder, folder=tmp_path / "replies", header=header)


@pytest.mark.parametrize(
    ("says", "classes", "verdict"),
    [
        ("entailment", CLASSES, "right"),
        ("contradiction", CLASSES, "wrong"),
        ("neutral", CLASSES, "unjudged"),
        ("ENTAILMENT", ("ENTAILMENT", "NEUTRAL", "CONTRADICTION"), "right"),
        ("not_entailment", ("not_entailment", "entailment"), "wrong"),
    ],
)
def test_classes_are_found_by_name(
    tmp_path: Path, header: Header, says: str, classes: tuple[str, ...], verdict: str
) -> None:
    """Models number them differently: by number, every second one would turn all labels round."""
    judge = _judge(_save(tmp_path / "nli", says, classes), tmp_path, header)
    judgement = judge.judge([CASE])[0]
    assert judgement.verdict == verdict
    assert judgement.reason == (UNDECIDED if verdict == "unjudged" else "")
    assert judge.name == "inference by nli@main"


def test_a_batch_of_accepted_answers_is_judged_as_each_alone(
    tmp_path: Path, header: Header
) -> None:
    """Padding must not decide."""
    judge = _judge(_save(tmp_path / "nli", None), tmp_path, header)
    hypotheses = ["where ? rome", "where ? it is in the oslo", "where ?"]
    together = judge._probabilities("where ? lima", hypotheses)
    alone = [judge._probabilities("where ? lima", [one])[0] for one in hypotheses]
    assert torch.allclose(together, torch.stack(alone), atol=1e-6)


def test_a_long_answer_is_cut_and_the_accepted_one_is_not(tmp_path: Path, header: Header) -> None:
    judge = _judge(_save(tmp_path / "nli", None), tmp_path, header)
    answer, accepted = " ".join(["rome"] * 500), " ".join(["it"] * 14)
    first = judge._probabilities(answer, [f"{accepted} oslo"])
    other = judge._probabilities(answer, [f"{accepted} lima"])
    assert not torch.equal(first, other)


def test_a_refusal_is_found_by_rule_and_verdicts_are_kept(
    tmp_path: Path, header: Header, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "I don't know" contradicts whatever is known; a run that was killed goes on."""
    folder = _save(tmp_path / "nli", "contradiction")
    refusal = CASE._replace(text="I don't know")
    first = _judge(folder, tmp_path, header).judge([CASE, refusal])
    assert [(j.verdict, j.reason) for j in first] == [("wrong", ""), ("abstained", ABSTAINED)]
    again = _judge(folder, tmp_path, header)
    monkeypatch.delattr(again, "_model")
    assert again.judge([refusal, CASE]) == first[::-1]


def test_another_model_in_a_folder_of_that_name_is_asked_anew(
    tmp_path: Path, header: Header
) -> None:
    """Verdicts are kept by what judged, not by what its folder is called."""
    folder = _save(tmp_path / "nli", "contradiction")
    assert _judge(folder, tmp_path, header).judge([CASE])[0].verdict == "wrong"
    folder = _save(tmp_path / "nli", "entailment")
    assert _judge(folder, tmp_path, header).judge([CASE])[0].verdict == "right"


def test_what_is_no_inference_model_is_refused(tmp_path: Path, header: Header) -> None:
    """A sentiment classifier would label everything, and nobody would see it."""
    folder = _save(tmp_path / "mood", None, ("negative", "positive"))
    with pytest.raises(ModelError, match=r"\(negative, positive\) is entailment"):
        _judge(folder, tmp_path, header)
    with pytest.raises(ModelError, match="no sequence classifier"):
        _judge(str(tmp_path / "none"), tmp_path, header)
