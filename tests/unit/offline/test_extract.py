"""Features: of the right token, of the right answer, float32 in the making, whole after a kill."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from offline.extract import (
    PADDING,
    TOKENS_PER_PASS,
    Item,
    Part,
    _batches,
    _plan,
    extract,
    make_items,
)
from offline.features import load_features
from offline.judge import Case, by_alias
from offline.label import label_one, locate
from offline.reader import Position
from offline.records import Answer, Label, RecordError
from offline.shards import SHARD_KEY, WHOLE, FeaturesHeader, Kind, features_header, read_shard_info
from probes.cett import cett, column_norms, h_norm
from probes.fingerprint import identity
from probes.neurons import find_ffns
from server.engines.fake_model import IM_END

MakeAnswer = Callable[..., Answer]
END = frozenset({IM_END})
ROW_BYTES = 3 * 24 * 2  # of the tiny model, float16


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


def _header(
    model: LlamaForCausalLM, position: Position = "read", dtype: str = "float16"
) -> FeaturesHeader:
    found = identity(
        model, find_ffns(model), model_id="tiny", revision="", tokenizer_sha256="t",
        chat_template_sha256="c",
    )  # fmt: skip
    return features_header(found, position, "labels", dtype=dtype)


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
    header = _header(tiny_model, position, "float32")
    rows = extract(tiny_model, items, tmp_path, header=header)
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


def test_what_a_large_model_writes_into_the_residual_stream_is_kept(
    tmp_path: Path, tiny_model: LlamaForCausalLM, answers: list[Answer], labels: list[Label]
) -> None:
    """Gemma's activations leave float16's range: stored in it they are infinite, and the dense
    rivals end in scikit-learn's words after hours."""
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 2.0**20
    extract(
        model,
        make_items(answers, labels, end_tokens=END),
        tmp_path,
        header=_header(model),
    )
    features = load_features(tmp_path)
    layer = features.header.residual_layers[0]
    assert np.abs(features.residual(np.arange(len(features.kind)), layer)).max() > 2**19


def test_numbers_that_are_not_finite_are_refused_with_their_answer(
    tmp_path: Path, tiny_model: LlamaForCausalLM, answers: list[Answer], labels: list[Label]
) -> None:
    items, model = make_items(answers, labels, end_tokens=END), copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(RecordError, match=r"not finite while it reads answer '.*--model-dtype"):
        extract(model, items, tmp_path, header=_header(model))
    assert not list(tmp_path.glob("shard-*.safetensors"))


def test_rows_say_what_their_token_is(
    tmp_path: Path, tiny_model: LlamaForCausalLM, answers: list[Answer], labels: list[Label]
) -> None:
    """Trap 9: no row of the prompt; what follows the claim is neither claim nor scaffold."""
    extract(
        tiny_model,
        make_items(answers, labels, end_tokens=END),
        tmp_path,
        header=_header(tiny_model),
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
    extract(tiny_model, items, tmp_path, header=_header(tiny_model))
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


@pytest.fixture
def run(
    tiny_model: LlamaForCausalLM, answers: list[Answer], labels: list[Label]
) -> Callable[..., dict[str, bytes]]:
    """Extracts into a folder of small shards; returns the folder's files."""

    def run(folder: Path, *parts: str) -> dict[str, bytes]:
        for part in parts or ("1/1",):
            extract(
                tiny_model,
                make_items(answers, labels, end_tokens=END),
                folder,
                header=_header(tiny_model),
                part=Part.parse(part),
                shard_bytes=20 * ROW_BYTES,
            )
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    return run


def test_a_killed_run_goes_on_and_ends_byte_identical(
    tmp_path: Path, run: Callable[..., dict[str, bytes]]
) -> None:
    whole = run(tmp_path)
    assert len(whole) > 1
    (tmp_path / "shard-00001.safetensors").unlink()
    (tmp_path / "shard-00001.safetensors.tmp").write_bytes(b"torn")
    assert run(tmp_path) == whole


def test_parts_made_by_several_processes_are_the_whole(
    tmp_path: Path, run: Callable[..., dict[str, bytes]]
) -> None:
    """Data parallelism without an engine of its own: shards do not know who made them. Until all
    parts have run the folder is refused, since a fit on half of the answers looks like a fit."""
    whole = run(tmp_path / "one")
    assert 0 < len(run(tmp_path / "two", "2/2")) < len(whole)
    with pytest.raises(RecordError, match=f"of {len(whole)} shards"):
        load_features(tmp_path / "two")
    assert run(tmp_path / "two", "1/2") == whole


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2", "1/0"])
def test_a_part_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(RecordError, match="I/N"):
        Part.parse(text)


@pytest.mark.parametrize("change", ["labels_sha256", "position", "dtype"])
def test_a_folder_of_another_run_is_not_gone_on_with(
    tmp_path: Path,
    tiny_model: LlamaForCausalLM,
    answers: list[Answer],
    labels: list[Label],
    change: str,
) -> None:
    """All its shards exist, so nothing would be read and the old features would be fitted on."""
    items = make_items(answers, labels, end_tokens=END)
    extract(tiny_model, items, tmp_path, header=_header(tiny_model))
    other = {"labels_sha256": "x", "position": "write", "dtype": "bfloat16"}[change]
    header = msgspec.structs.replace(_header(tiny_model), **{change: other})
    with pytest.raises(RecordError, match="other labels"):
        extract(tiny_model, items, tmp_path, header=header)


def test_an_answer_without_a_claim_gives_rows_of_its_own_that_nothing_is_fitted_on(
    tmp_path: Path,
    tiny_model: LlamaForCausalLM,
    answers: list[Answer],
    labels: list[Label],
    make_answer: MakeAnswer,
) -> None:
    """Trap 10: the reference saved the previous answer's tensor under this one's name."""
    bare = make_answer("It is a town.", id="set/ask/bare/0")
    silent = msgspec.structs.replace(bare, id="set/ask/silent/0", token_ids=(IM_END,))
    label = Label(id=bare.id, verdict="wrong", span=(), tokens=(), others=(), dropped="")
    others = [
        msgspec.structs.replace(label, id=silent.id),
        msgspec.structs.replace(labels[0], dropped="no words that make the claim"),
    ]
    items = make_items([*answers, bare, silent], [label, *others, *labels[1:]], end_tokens=END)
    assert {item.id for item in items} == {bare.id, answers[1].id, answers[2].id}
    extract(tiny_model, items, tmp_path, header=_header(tiny_model, dtype="float32"))
    features = load_features(tmp_path)
    here = np.flatnonzero(features.answer == features.ids.index(bare.id))
    assert set(features.kind[here]) == {Kind.UNJUDGED}
    start = len(bare.prompt_token_ids)
    ids = [*bare.prompt_token_ids, *bare.token_ids[:-1]]
    expected = _reference(tiny_model, ids)[start:].numpy()
    assert np.median(np.abs(features.cett(here) - expected) / (expected + 1e-3)) < 0.01


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
    extract(tiny_model, items, tmp_path, header=header, shard_bytes=20 * ROW_BYTES)
    first = tmp_path / "shard-00000.safetensors"
    tensors = load_file(first)
    info = read_shard_info(first)

    def save(header: FeaturesHeader, **changed: torch.Tensor) -> None:
        written = msgspec.json.encode(msgspec.structs.replace(info, header=header)).decode()
        save_file(tensors | changed, first, {SHARD_KEY: written})

    save(msgspec.structs.replace(header, labels_sha256="other"))
    with pytest.raises(RecordError, match="another run"):
        load_features(tmp_path)
    save(header, answer=tensors["answer"][1:].clone())
    with pytest.raises(RecordError, match="rows of"):
        load_features(tmp_path)


def test_a_pass_holds_whole_answers_once_and_little_padding() -> None:
    """A slot of padding costs a CPU what a token costs; an answer that is lost or read twice gives
    a shard whose rows and labels disagree."""
    random = np.random.default_rng(0)
    items = [
        Item(
            id=str(i),
            prompt=tuple(range(10 + i % 7)),
            written=(1,) * int(random.choice((5, 8, 30, 200))),
            kinds=(),
        )
        for i in range(300)
    ]
    (shard,) = _plan(items, rows_per_shard=10**6)
    batches = list(_batches(shard, shared=5))
    assert sorted(item.id for batch in batches for item in batch) == sorted(i.id for i in items)
    for batch in batches:
        slots = len(batch) * (max(len(item.written) for item in batch) + 1)
        assert slots <= TOKENS_PER_PASS
        assert slots - sum(len(item.written) + 1 for item in batch) <= PADDING
    assert len(batches) < 20
