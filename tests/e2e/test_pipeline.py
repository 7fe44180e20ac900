"""From questions to a probe that a server loads, on a tiny model, over HTTP, on a CPU.

The model is trained for a few seconds to answer in sentences, so that right and wrong answers,
their claims and ordinary prose exist; everything after that is the product's own path.
"""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from offline import metrics
from offline.__main__ import app
from offline.extract import Kind
from offline.features import load_features
from offline.fit import FitResult
from offline.label import used
from offline.models import load_model, load_tokenizer
from offline.questions import Source, read_questions
from offline.records import Answer, Label, read_records
from probes import known_answer
from probes.calibration import calibrate
from probes.fingerprint import match
from probes.neurons import find_ffns
from probes.probe import Probe
from probes.tap import Meter

RIGHT = ("Rome", "Oslo", "Lima", "Bonn")
WRONG = ("Kiel", "Nice", "Bath", "Graz")
PROSE = (
    "once upon a time there was a small dog who liked the sea and slept all day",
    "first take a cup and then fill it with warm water and wait a little while",
    "it is good to walk in the morning because the air is fresh and clear",
)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %} :"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Question file (20 relations of 8) and ordinary prompts."""
    folder = tmp_path_factory.mktemp("questions")
    number = count()
    facts = [
        {"id": f"q{n}", "question": f"The r{g} of e{n} is", "answers": RIGHT, "group": f"r{g}"}
        for g in range(20)
        for n in (next(number) for _ in range(8))
    ]
    prompts = [
        {"id": f"p{n}", "prompt": f"Tell me about e{n}", "kind": "story", "split": split}
        for n, split in enumerate(["fit"] * 9 + ["held_out"] * 6 + ["test"] * 6)
    ]
    for name, rows in (("facts", facts), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "facts.jsonl", folder / "prompts.jsonl"


@pytest.fixture(scope="module")
def tiny_model(questions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama that answers half of the questions wrongly."""
    facts, prompts = questions
    pairs = [
        (q.prompt, f" {q.question} {(RIGHT + WRONG)[i % 8]}.")
        for i, q in enumerate(read_questions(Source.parse(f"{facts}:complete")))
    ]
    pairs += [
        (p.prompt, f" {PROSE[i % 3]}")
        for i, p in enumerate(read_questions(Source.parse(f"{prompts}:ordinary")))
    ]
    tokenizer = _tokenizer(pairs)
    model = _trained(tokenizer, pairs)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(
    tiny_model: Path, questions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of one finished run of `train`."""
    facts, prompts = questions
    out = tmp_path_factory.mktemp("run") / "tiny"
    arguments = ["train", str(tiny_model), "--out", str(out), "--name", "tiny"]
    arguments += ["--questions", f"{facts}:complete", "--questions", f"{prompts}:ordinary"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "RESAMPLES", 20)  # the intervals are not what is tested here
        result = CliRunner().invoke(app, [*arguments, "--solver", "liblinear"])
    assert result.exit_code == 0, (result.output, result.exception)
    return out


def test_answers_come_over_http_and_are_labelled_with_their_claims(run: Path) -> None:
    _, answers = read_records(run / "answers.jsonl", Answer)
    _, labels = read_records(run / "labels.jsonl", Label)
    assert len(answers) == len(labels) == 181
    verdicts = [label.verdict for label in labels if not label.dropped]
    assert verdicts.count("right") > 50
    assert verdicts.count("wrong") > 50
    assert verdicts.count("ordinary") == 21
    text = {answer.id: answer.text for answer in answers}
    for label in labels:
        if label.verdict == "wrong" and not label.dropped:
            assert all(text[label.id][slice(*span)] not in RIGHT for span in label.span)


def test_the_features_hold_every_token_once(run: Path) -> None:
    features = load_features(run / "features")
    _, labels = read_records(run / "labels.jsonl", Label)
    wanted = sum(len(label.tokens) for label in used(labels) if label.verdict == "wrong")
    assert int((features.kind == Kind.WRONG).sum()) == wanted


def test_the_probe_loads_matches_and_reads_what_it_recorded(run: Path, tiny_model: Path) -> None:
    """The artifact is bound to the model and proves that the online meter reads it alike."""
    probe = Probe.load(run / "probe")
    loaded = load_model(
        str(tiny_model), revision=None, tokenizer=load_tokenizer(str(tiny_model), revision=None)
    )
    match(probe, loaded.identity)
    with Meter(find_ffns(loaded.model), [probe], suppression=False) as meter:
        found = []
        for answer in probe.card.known_answers:
            meter.begin(batch=1)
            with torch.inference_mode():
                loaded.model(torch.tensor([answer.token_ids]))
            found.append(meter.logits()[0].tolist())
    known_answer.check(probe, found)


def test_online_logits_are_the_offline_ones(run: Path, tiny_model: Path) -> None:
    """No skew: what was fitted on stored features is what the meter reads, token by token."""
    probe = Probe.load(run / "probe")
    features = load_features(run / "features")
    chosen = FitResult.load(run / "fit.json").chosen
    loaded = load_model(
        str(tiny_model), revision=None, tokenizer=load_tokenizer(str(tiny_model), revision=None)
    )
    answers = {a.id: a for a in read_records(run / "answers.jsonl", Answer)[1]}
    with Meter(find_ffns(loaded.model), [probe], suppression=False) as meter:
        for i in range(0, len(features.ids), 20):
            answer = answers[features.ids[i]]
            rows = (features.answer == i).nonzero()[0]
            meter.begin(batch=1)
            with torch.inference_mode():
                loaded.model(torch.tensor([[*answer.prompt_token_ids, *answer.token_ids]]))
            start = len(answer.prompt_token_ids)
            online = meter.logits()[0, start : start + len(rows), 0].numpy()
            offline = chosen.logits(features, rows)
            assert online == pytest.approx(offline, abs=0.02)  # features are stored in float16


def test_wrong_claims_have_a_higher_risk_than_right_ones_and_prose(run: Path) -> None:
    """Trap 20: polarity, through every verb."""
    probe = Probe.load(run / "probe")
    features = load_features(run / "features")
    chosen = FitResult.load(run / "fit.json").chosen
    mean = {}
    for kind in (Kind.WRONG, Kind.RIGHT, Kind.PROSE):
        logits = chosen.logits(features, (features.kind == kind).nonzero()[0])
        mean[kind] = calibrate(probe.card.token.calibration, logits).mean()
    assert mean[Kind.WRONG] > mean[Kind.RIGHT] + 0.3
    assert mean[Kind.WRONG] > mean[Kind.PROSE] + 0.3


def test_the_card_says_what_was_measured_and_what_not(run: Path) -> None:
    card = Probe.load(run / "probe").card
    assert {row.detector for row in card.evaluation} >= {"probe", "length", "-logprob_mean"}
    readme = (run / "probe" / "README.md").read_text()
    assert all(sentence in readme for sentence in card.not_good_for)
    assert str(run.parent) not in readme + (run / "probe" / "probe.json").read_text()


def test_collecting_again_asks_nothing_and_changes_nothing(
    run: Path, tiny_model: Path, questions: tuple[Path, Path]
) -> None:
    """Nor does it start a server for nothing."""
    before = (run / "answers.jsonl").read_bytes()
    result = CliRunner().invoke(
        app,
        ["collect", str(tiny_model), "--out", str(run), "--questions", f"{questions[0]}:complete"],
    )
    assert result.exit_code == 0, result.output
    assert (run / "answers.jsonl").read_bytes() == before


def _tokenizer(pairs: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = {"<unk>": 0, "<eos>": 1}
    for text in (*(part for pair in pairs for part in pair), " :"):
        for piece, _ in split.pre_tokenize_str(text):
            pieces.setdefault(piece, len(pieces))
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _trained(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    rows = []
    for prompt, answer in pairs:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], return_dict=False
        )
        written = [*tokenizer.encode(answer), 1]
        rows.append((ids + written, [-100] * len(ids) + written))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [1] * (longest - len(ids)) for ids, _ in rows])
    wanted = torch.tensor([w + [-100] * (longest - len(w)) for _, w in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        chosen = torch.randint(len(rows), (32,))
        loss = model(input_ids=ids[chosen], labels=wanted[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
