"""Which characters make the claim and which tokens they are, from the kept ids."""

from __future__ import annotations

import itertools

import pytest
from transformers import PreTrainedTokenizerFast

from offline.answer_spans import (
    closing,
    locate_right,
    locate_wrong,
    overlapping,
    scaffold,
    token_offsets,
)
from offline.judge import usable_aliases


@pytest.mark.parametrize(
    ("question", "text", "gold", "claim"),
    [
        ("The capital of Poland is", "The capital of Poland is Krakow.", "Warsaw", ["Krakow"]),
        ("The country of Luxor is", "The country of Luxor is Luxor", "Egypt", ["Luxor"]),
        ("Ottawa is located in", "Ottawa is located in the city of Perth.", "Ontario", ["Perth"]),
        ("The color of brandy is", "The color of brandy is blue.", "amber", ["blue"]),
        ("Who was it?", "It was Shaquille O'Neal.", "Jordan", ["Shaquille O'Neal"]),
        ("Who was it?", 'It was "Björk" 🎉!', "Sade", ["Björk"]),
        ("Who sang it?", "Dean Martin sang it. He was born in Ohio.", "Sade", ["Dean Martin"]),
        ("Where?", "It was St. Louis, Missouri.", "Perth", ["St. Louis"]),
        ("The phone number is", "The phone number is 911", "112", ["911"]),
    ],
)
def test_the_claim_of_a_wrong_answer_is_what_the_question_did_not_give(
    question: str, text: str, gold: str, claim: list[str]
) -> None:
    """Exact spans decide everything (token AUROC .71 with whole answers, .87 with spans); trap 5:
    apostrophes, quotes, accents and emoji lose nothing."""
    located = locate_wrong(text, question, [gold])
    assert located is not None
    assert [text[start:stop] for start, stop in located.spans] == claim


@pytest.mark.parametrize(
    "text",
    [
        "The capital of Poland is",
        "of the",
        "",
        "tall trees grow slowly beside quiet rivers near ancient stone bridges everywhere",
    ],
)
def test_an_answer_without_a_locatable_claim_gives_none(text: str) -> None:
    """Trap 10: the reference saved the previous answer's tensor again."""
    assert locate_wrong(text, "The capital of Poland is", ["Warsaw"]) is None


def test_a_repeated_word_resolves_to_the_claim_and_not_to_its_first_occurrence(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Trap 6: the reference takes the first match of the answer's tokens, inside the question."""
    text, question = "August is followed by August.", "August is followed by"
    located = locate_wrong(text, question, ["September"])
    assert located is not None
    assert located.spans == ((22, 28),)
    offsets = token_offsets(tokenizer, tokenizer.encode(text))
    assert overlapping(offsets, located.spans) == tuple(range(22, 28))


def test_scaffold_is_what_repeats_the_question_and_ends_with_the_claim() -> None:
    """Trap 9: "other" tokens lie inside the answer; what follows the claim was not judged."""
    text = "The capital of Poland is Warsaw, which lies on the Danube."
    located = locate_right(text, usable_aliases(["Warsaw"], "The capital of Poland is"))
    assert located is not None
    around = scaffold(text, "The capital of Poland is", located)
    assert [text[a:b] for a, b in around] == ["The", "capital", "of", "Poland", "is"]


def test_the_full_stop_after_the_claim_is_judged_and_the_next_word_is_not(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = "It is Warsaw. Hm"
    located = locate_right(text, [("warsaw",)])
    assert located is not None
    offsets = token_offsets(tokenizer, tokenizer.encode(text))
    assert [text[offsets[i][0]] for i in closing(offsets, text, located)] == [".", " "]


@pytest.mark.parametrize("text", ["Łódź", "🎉 party", "naïve café", "a\u2028b", "日本"])
def test_offsets_come_from_ids_and_cover_the_text_once(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    """Trap 7: never re-tokenised. A character whose bytes lie in several tokens is counted once."""
    ids = tokenizer.encode(text)
    offsets = token_offsets(tokenizer, ids)
    assert len(offsets) == len(ids)
    assert "".join(text[start:stop] for start, stop in offsets) == text
    assert all(a[1] == b[0] for a, b in itertools.pairwise(offsets))


def test_a_character_of_several_tokens_belongs_to_the_last_of_them(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Before its last byte the decoder shows a replacement character, which is nobody's text."""
    assert token_offsets(tokenizer, tokenizer.encode("é!")) == [(0, 0), (0, 1), (1, 2)]
    assert token_offsets(tokenizer, tokenizer.encode("🎉")) == [(0, 0), (0, 0), (0, 0), (0, 1)]


def test_an_end_token_writes_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [*tokenizer.encode("Hi"), tokenizer.eos_token_id]
    assert token_offsets(tokenizer, ids) == [(0, 1), (1, 2), (2, 2)]
