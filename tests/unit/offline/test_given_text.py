"""Given texts: facts lie where they are said to lie, wrong ones are wrong, seen ones stay apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from offline.given_text import GivenText, given_texts
from offline.records import RecordError
from offline.shards import Kind
from offline.splits import home


def test_a_wrong_fact_says_what_another_row_of_the_relation_accepts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [
        {"id": f"{g}-{s}", "question": f"The r{g} of s{s} is", "answers": [f"a{g}x{s % 3}"],
         "group": f"r{g} of"}
        for g in range(12)
        for s in range(9)
    ]  # fmt: skip
    texts = given_texts([f"{_written(tmp_path, rows)}:facts:8"], tokenizer, seed=1)
    assert {len(text.facts) for text in texts if text.kind.startswith("lists")} == {6}
    assert any(fact.wrong for text in texts for fact in text.facts)
    accepted = {row["question"]: row["answers"][0] for row in rows}
    for text in texts:
        said = tokenizer.decode(text.token_ids)
        sentences = [sentence.split(" is ") for sentence in said.strip(".").split(". ")]
        assert len(sentences) == len(text.facts)
        for (question, answer), fact in zip(sentences, text.facts, strict=True):
            assert _words(tokenizer, text, fact.tokens) == answer
            assert (accepted[f"{question} is"] != answer) == fact.wrong
            assert answer.split("x")[0] == accepted[f"{question} is"].split("x")[0]
            if text.kind.startswith("lists"):
                group = question.removeprefix("The ").split(" s")[0]
                assert home(f"set/{group}", 1) == "test"


def test_marked_spans_stand_against_the_other_sentences(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    response = "It is old. Kant was Dutch. He wrote."
    marked = {"start": response.index("Dutch"), "end": response.index("Dutch") + 5}
    rows = [
        {"id": "h1", "question": "q", "response": response, "spans": [marked], "spans_dropped": 0},
        {"id": "h2", "question": "q", "response": response, "spans": [marked], "spans_dropped": 1},
        {"id": "h3", "question": "q", "response": response, "spans": []},
    ]
    (text,) = given_texts([f"{_written(tmp_path, rows)}:halueval"], tokenizer, seed=1)
    facts = [(_words(tokenizer, text, fact.tokens), fact.wrong) for fact in text.facts]
    assert facts == [("Dutch", True), ("It is old", False), ("He wrote", False)]
    kinds = text.item().kinds
    assert kinds.count(Kind.WRONG) == len("Dutch")
    assert kinds.count(Kind.UNJUDGED) == len(". Kant was ..")


def test_an_object_counts_where_its_place_and_its_label_are_certain(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    labels = {"Bonn": "Entailment", "Kiel": "Contradiction", "Rome": "Neutral", "it": "Entailment"}
    rows = [
        {
            "id": "r1",
            "question": "q",
            "response": "bonn, then Kiel, Rome; it was it, and Romeo.",
            "triplets": [
                {"triplet": ["s", "p", said], "human_label": label}
                for said, label in labels.items()
            ],
        }
    ]
    (text,) = given_texts([f"{_written(tmp_path, rows)}:refchecker"], tokenizer, seed=1)
    facts = [(_words(tokenizer, text, fact.tokens), fact.wrong) for fact in text.facts]
    assert facts == [("bonn", False), ("Kiel", True)]


@pytest.mark.parametrize("ending", ["", ":poems", ":facts:few"])
def test_an_unknown_kind_is_refused(
    ending: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(RecordError, match="is not PATH:KIND"):
        given_texts([f"{tmp_path}/x.jsonl{ending}"], tokenizer, seed=1)


def test_texts_without_both_kinds_of_facts_are_no_test(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"id": "r1", "question": "q", "response": "Bonn", "triplets": []}]
    with pytest.raises(RecordError, match="side by side"):
        given_texts([f"{_written(tmp_path, rows)}:refchecker"], tokenizer, seed=1)


def _words(tokenizer: PreTrainedTokenizerFast, text: GivenText, tokens: tuple[int, ...]) -> str:
    return tokenizer.decode([text.token_ids[token] for token in tokens]).strip()


def _written(folder: Path, rows: list[dict[str, object]]) -> Path:
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
