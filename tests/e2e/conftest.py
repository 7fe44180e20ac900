"""A model that is trained for a few seconds to answer half of its questions wrongly, in sentences,
so that right and wrong answers, their claims and ordinary prose exist."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from offline.questions import Source, read_questions

RIGHT = ("Rome", "Oslo", "Lima", "Bonn")
WRONG = ("Kiel", "Nice", "Bath", "Graz")
PROSE = (
    "once upon a time there was a small dog who liked the sea and slept all day",
    "first take a cup and then fill it with warm water and wait a little while",
    "it is good to walk in the morning because the air is fresh and clear",
)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %} :"


@pytest.fixture(scope="session")
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
        for n, split in enumerate(["fit"] * 15 + ["test"] * 6)
    ]
    for name, rows in (("facts", facts), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "facts.jsonl", folder / "prompts.jsonl"


@pytest.fixture(scope="session")
def statements(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 relations of 2 questions that accept one answer each: what can be told wrongly."""
    rows = [
        {"id": f"s{g}-{i}", "question": f"The s{g} of e{i} is", "answers": [said], "group": f"s{g}"}
        for g in range(10)
        for i, said in enumerate(RIGHT[:2])
    ]
    path = tmp_path_factory.mktemp("statements") / "statements.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with one right and one wrong fact each, in the form of RefChecker."""
    rows = [
        {
            "id": f"g{i}",
            "question": f"Tell me about e{i}",
            "response": f" The r{i} of e{i} is {RIGHT[i % 4]}. The r{i} of e{i} is {WRONG[i % 4]}.",
            "triplets": [
                {"triplet": [f"e{i}", "is", RIGHT[i % 4]], "human_label": "Entailment"},
                {"triplet": [f"e{i}", "is", WRONG[i % 4]], "human_label": "Contradiction"},
            ],
        }
        for i in range(20)
    ]
    path = tmp_path_factory.mktemp("given") / "given.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_model(
    questions: tuple[Path, Path], statements: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
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
    pairs += [
        (q.prompt, f" {q.question} {(q.gold[0], WRONG[0])[i % 2]}.")
        for i, q in enumerate(read_questions(Source.parse(f"{statements}:complete")))
    ]
    tokenizer = _tokenizer(pairs)
    model = _trained(tokenizer, pairs)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def right_answers() -> tuple[str, ...]:
    """What is accepted, whichever question is asked."""
    return RIGHT


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
