"""What the fake engine serves: a byte-level tokenizer and a probe, both built in code."""

from __future__ import annotations

import hashlib
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from probes.calibration import OperatingPoint, Platt
from probes.card import (
    SCHEMA_VERSION,
    EvaluationRow,
    KnownAnswer,
    ModelIdentity,
    ProbeCard,
    ReferenceRisks,
    ResponseRule,
    SpanRule,
    TokenRule,
)
from probes.cett import FORMULA_VERSION
from probes.probe import Probe
from probes.spans import Pooling

# A token id below 256 is that byte; the rest are special tokens.
EOS, IM_START, IM_END = 256, 257, 258
VOCAB_SIZE = 259
# Of risks of ordinary text with a year or a price in it: one character in ten is a digit.
_REFERENCE = ReferenceRisks(
    edges=(0.042, 0.0475, 0.053, 0.5), shares=(0.225, 0.225, 0.225, 0.225, 0.1)
)
_DIGITS = frozenset(b"0123456789")
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def fake_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, ChatML turns."""
    alphabet = _byte_alphabet()
    model = models.BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in _SPECIAL])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def fake_identity() -> ModelIdentity:
    """The model that the fake engine pretends to be."""
    return ModelIdentity(
        model_id="fake",
        revision="",
        config_digest=_digest("config"),
        weights_fingerprint=_digest("weights"),
        tokenizer_sha256=_digest("tokenizer"),
        chat_template_sha256=_digest("template"),
        dtype="float32",
        num_layers=4,
        intermediate_size=64,
        hidden_size=16,
        vocab_size=VOCAB_SIZE,
    )


def fake_probe(
    name: str = "fake", *, position: Literal["read", "write"] = "read", default: str = "fpr_5"
) -> Probe:
    """A probe bound to the fake model; its logits are made up by `FakeEngine`.

    `default` names the operating point that is used when a request sets no threshold.
    """
    points = tuple(
        OperatingPoint(name=f"fpr_{p}", threshold=t, false_positive_rate=p / 100, recall=r)
        for p, t, r in ((1, 0.9, 0.5), (5, 0.5, 0.8), (10, 0.3, 0.9))
    )
    calibration = Platt(slope=1.0, intercept=0.0)
    card = ProbeCard(
        schema_version=SCHEMA_VERSION,
        formula_version=FORMULA_VERSION,
        name=name,
        position=position,
        heads=("token", "answer"),
        token=TokenRule(
            head="token",
            calibration=calibration,
            span=SpanRule(pooling=Pooling("mean"), calibration=Platt(slope=0.8, intercept=0.0)),
            operating_points=points,
            default=default,
            reference=_REFERENCE,
        ),
        response=ResponseRule(
            head="answer",
            pooling=Pooling(kind="max_window", window=2),
            calibration=Platt(slope=2.0, intercept=0.0),
            operating_points=points,
            default=default,
        ),
        model=fake_identity(),
        training={"data": "none"},
        evaluation=(
            EvaluationRow(dataset="digits", detector="probe", metric="auroc", value=1.0, n=10),
        ),
        reliability=(),
        not_good_for=("anything: it reads no model",),
        libraries={},
        created="2026-11-23",
        tensors_sha256="",  # written by Probe.make
        known_answers=(_known_answer("In 1969"), _known_answer("no number")),
    )
    return Probe.make(
        card,
        layer=[0, 1, 2, 3],
        neuron=[0, 10, 20, 30],
        weight=[[1.0, 0.5], [0.5, 0.25], [0.25, 0.125], [-0.125, -0.0625]],
        column_norm=[1.0, 1.0, 1.0, 1.0],
        bias=[-3.0, -1.5],
    )


def fake_logits(
    token_id: int, position: int, *, alpha: float = 1.0, heads: int = 2
) -> tuple[float, ...]:
    """First head: +3 for a digit at alpha 1, -3 at alpha 0 and for all else, with a wobble.

    Every head reads half of what the head before it reads, so that they differ.
    """
    wobble = (token_id * 31 + position * 17) % 100 / 200 - 0.25
    logit = -3.0 + (6.0 * alpha if token_id in _DIGITS else 0.0) + wobble
    return tuple(logit / 2**head for head in range(heads))


def _known_answer(text: str) -> KnownAnswer:
    ids = tuple(text.encode())
    return KnownAnswer(token_ids=ids, logits=tuple(fake_logits(t, i) for i, t in enumerate(ids)))


def _byte_alphabet() -> list[str]:
    """The characters that stand for bytes 0..255 in byte-level tokenizers (GPT-2's table)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)]


def _digest(word: str) -> str:
    return hashlib.sha256(f"hneurons fake {word}".encode()).hexdigest()
