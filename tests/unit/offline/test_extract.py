"""Features: of the right token, of the right answer, float32 in the making, whole after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from offline.extract import (
    SHARD_KEY,
    WHOLE,
    FeaturesHeader,
    Kind,
    Position,
    ShardInfo,
    extract,
    features_header,
    make_items,
)
from offline.features import load_features
from offline.judge import Case, by_alias
from offline.label import label_one, locate
from offline.records import Answer, Label, RecordError
from probes.cett import cett, column_norms, h_norm
from probes.fingerprint import identity
from probes.neurons import find_ffns
from server.engines.fake_model import IM_END

MakeAnswer = Callable[..., Answer]
END = frozenset({IM_END})


@pytest.fixture
def answers(make_answer: MakeAnswer) -> list[Answer]:
    texts = [
        "The capital of Poland is Warsaw.",
        "The capital of Poland is Lodz, a city.",
        "Hm Rome",
    ]
    return [make_answer(text, id=f"set/ask/q{i}/0") for i, text in enumerate(texts)]


@pytest.fixture
def labels(answers: list[Answer], tokenizer: PreTrainedTokenizerFast) -> list[Label]:
    return [_label(answer, tokenizer) for answer in answers]


def _label(answer: Answer, tokenizer: PreTrainedTokenizerFast) -> Label:
    said = by_alias(Case(answer.id, answer.question, answer.gold, answer.text))
    return label_one(answer, tokenizer, said, locate(answer, said.verdict))


def _header(model: LlamaForCausalLM, position: Position = "read") -> FeaturesHeader:
    found = identity(
        model, find_ffns(model), model_id="tiny", revision="", tokenizer_sha256="t",
        chat_template_sha256="c",
    )  # fmt: skip
    return features_header(found, position, "labels")


def _reference(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """CETT of every neuron at every position by plain hooks: `[tokens, layers * neurons]`."""
    kept: list[torch.Tensor] = []

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        norms = column_norms(module.weight)
        kept.append(cett(args[0][0], norms, h_norm(out[0]).unsqueeze(-1)))

    handles = [layer.mlp.down_proj.register_forward_hook(hook) for layer in model.model.layers]
    with torch.inference_mode():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.cat(kept, dim=-1)


@pytest.mark.parametrize("position", ["read", "write"])
def test_a_row_is_the_pass_that_was_fed_its_token(
    tmp_path: Path,
    tiny_model: LlamaForCausalLM,
    answers: list[Answer],
    labels: list[Label],
    position: Position,
) -> None:
    """Traps 8, 10, 12: positions come from the kept ids; each answer's own rows; float32 arithmetic
    on a bfloat16 model. `write` is the pass before, which produced the token."""
    items = make_items(answers, labels, end_tokens=END)
    header = _header(tiny_model, position)
    rows = extract(tiny_model, items, tmp_path, header=header, dtype=torch.float32)
    features = load_features(tmp_path)
    assert rows == len(features.kind) == sum(len(item.written) for item in items)
    shift = 0 if position == "read" else -1
    for i, id in enumerate(features.ids):
        answer = next(answer for answer in answers if answer.id == id)
        here = np.flatnonzero(features.answer == i)
        assert features.token[here].tolist() == list(range(len(here)))
        ids = [*answer.prompt_token_ids, *answer.token_ids[:-1]]
        start = len(answer.prompt_token_ids) + shift
        expected = _reference(tiny_model, ids)[start : start + len(here)].numpy()
        # Another batch shape rounds bfloat16 activations otherwise; one token off is far from this.
        assert np.median(np.abs(features.cett(here) - expected) / (expected + 1e-3)) < 0.01
        if position == "read":
            assert features.cett(here).dtype == np.float32


def test_rows_say_what_their_token_is(
    tmp_path: Path, tiny_model: LlamaForCausalLM, answers: list[Answer], labels: list[Label]
) -> None:
    """Trap 9: no row of the prompt; what follows the claim is neither claim nor scaffold."""
    extract(
        tiny_model,
        make_items(answers, labels, end_tokens=END),
        tmp_path,
        header=_header(tiny_model),
        dtype=torch.float16,
    )
    features = load_features(tmp_path)
    text: dict[str, dict[Kind, str]] = {}
    for i, id in enumerate(features.ids):
        answer = next(answer for answer in answers if answer.id == id)
        here = features.answer == i
        text[id] = {
            kind: bytes(answer.token_ids[t] for t in features.token[here & (features.kind == kind)])
            .decode()
            .strip()
            for kind in Kind
        }
    assert text["set/ask/q0/0"][Kind.RIGHT] == "Warsaw"
    assert text["set/ask/q0/0"][Kind.SCAFFOLD].startswith("The")
    assert text["set/ask/q1/0"][Kind.WRONG] == "Lodz"
    assert text["set/ask/q1/0"][Kind.UNJUDGED].endswith("city.")


def test_logprob_and_entropy_are_of_the_token_given_what_stands_before_it(
    tmp_path: Path, tiny_model: LlamaForCausalLM, answers: list[Answer], labels: list[Label]
) -> None:
    """Off by one, the log-probability baseline would be of the next token and look useless."""
    items = make_items(answers, labels, end_tokens=END)
    extract(tiny_model, items, tmp_path, header=_header(tiny_model), dtype=torch.float16)
    features = load_features(tmp_path)
    for i, id in enumerate(features.ids):
        item = next(item for item in items if item.id == id)
        with torch.inference_mode():
            logits = tiny_model(torch.tensor([[*item.prompt, *item.written]])).logits[0].float()
        predicted = logits.log_softmax(-1)[len(item.prompt) - 1 : -1]
        expected = predicted[torch.arange(len(item.written)), list(item.written)]
        here = features.answer == i
        assert features.logprob[here] == pytest.approx(expected.numpy(), abs=0.05)
        entropy = -(predicted.exp() * predicted).sum(-1)
        assert features.entropy[here] == pytest.approx(entropy.numpy(), abs=0.05)
        whole = dict(zip(WHOLE, features.whole[i], strict=True))
        assert whole["logprob_sum"] == pytest.approx(float(features.logprob[here].sum()), abs=1e-3)
        assert whole["length"] == len(item.written)


def test_a_killed_run_goes_on_and_ends_byte_identical(
    tmp_path: Path, tiny_model: LlamaForCausalLM, answers: list[Answer], labels: list[Label]
) -> None:
    items = make_items(answers, labels, end_tokens=END)

    def run(folder: Path) -> dict[str, bytes]:
        extract(
            tiny_model, items, folder, header=_header(tiny_model), dtype=torch.float16,
            rows_per_shard=20,
        )  # fmt: skip
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    whole = run(tmp_path / "a")
    assert len(whole) > 1
    (tmp_path / "a" / "shard-00001.safetensors").unlink()
    (tmp_path / "a" / "shard-00001.safetensors.tmp").write_bytes(b"torn")
    again = run(tmp_path / "a")
    assert again == whole


def test_an_answer_without_a_span_gives_no_row(
    answers: list[Answer], tokenizer: PreTrainedTokenizerFast, make_answer: MakeAnswer
) -> None:
    """Trap 10: the reference saved the previous answer's tensor under this one's name."""
    empty = make_answer("The capital of Poland is", id="set/ask/none/0")
    labels = [_label(answer, tokenizer) for answer in (*answers, empty)]
    items = make_items([*answers, empty], labels, end_tokens=END)
    assert "set/ask/none/0" not in {item.id for item in items}


def test_labels_of_other_answers_are_an_error(answers: list[Answer], labels: list[Label]) -> None:
    """Trap 14: a missing file is no reason to go on with the rest."""
    with pytest.raises(RecordError, match="has no answer"):
        make_items(answers[1:], labels, end_tokens=END)


def test_shards_of_another_run_or_with_missing_rows_are_an_error(
    tmp_path: Path, tiny_model: LlamaForCausalLM, answers: list[Answer], labels: list[Label]
) -> None:
    """Trap 14: the reference's matrix and its list of ids disagree in silence."""
    items = make_items(answers, labels, end_tokens=END)
    header = _header(tiny_model)
    extract(tiny_model, items, tmp_path, header=header, dtype=torch.float16, rows_per_shard=20)
    first = tmp_path / "shard-00000.safetensors"
    tensors = load_file(first)
    ids = load_features(tmp_path).ids[:1]

    def save(header: FeaturesHeader, **changed: torch.Tensor) -> None:
        info = msgspec.json.encode(ShardInfo(header=header, ids=ids)).decode()
        save_file(tensors | changed, first, {SHARD_KEY: info})

    save(msgspec.structs.replace(header, labels_sha256="other"))
    with pytest.raises(RecordError, match="another run"):
        load_features(tmp_path)
    save(header, answer=tensors["answer"][1:].clone())
    with pytest.raises(RecordError, match="rows of"):
        load_features(tmp_path)
