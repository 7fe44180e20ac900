"""Right, wrong or no answer: every near miss here was a wrong label in the reference code."""

from __future__ import annotations

import pytest

from offline.judge import abstains, find_alias, judge, usable_aliases


@pytest.mark.parametrize(
    ("text", "alias", "right"),
    [
        ("It is Russia", "us", False),
        ("It is in Russia", "Rus", False),
        ("the USA", "US", False),
        ("made in the US.", "US", True),
        ("he told us", "US", False),
        ("that is incorrect", "correct", False),
        ("Warsaw", "warsaw", True),
        ("WARSAW!", "Warsaw", True),
        ("Bogotá", "Bogota", True),
        ("Bogota", "Bogotá", True),
        ("Shaquille O'Neill", "O'Neill", True),
        ("Shaquille O\N{RIGHT SINGLE QUOTATION MARK}Neill", "O'Neill", True),
        ("Paris's river", "Paris", True),
        ("Parisian", "Paris", False),
        ("The New York Times", "New York", True),
        ("York, New England", "New York", False),
        ("in 1912", "191", False),
        ("1,912 people", "1912", False),
        ("born in 1912.", "1912", True),
        ("rock-and-roll", "rock", True),
        ("Łódź 🎉 Warszawa", "warszawa", True),
        ("blood type A", "A", True),
        ("it is a guitar", "A", False),
        ("東京 is it", "東京", True),
    ],
)
def test_an_alias_is_found_as_whole_words_only(text: str, alias: str, right: bool) -> None:
    """Trap 3: the reference's substring match finds "us" in "Russia"."""
    aliases = usable_aliases([alias], "What?")
    assert bool(aliases and find_alias(text, aliases)) is right


def test_an_alias_that_the_question_contains_is_no_evidence() -> None:
    """188 TriviaQA questions accept words of the question: repeating it would count as right."""
    question = "What is the capital of Kenya?"
    aliases = usable_aliases(["Capital of Kenya", "Nairobi"], question)
    assert aliases == [("nairobi",)]
    assert judge("The capital of Kenya is Mombasa.", aliases) == "wrong"
    assert judge("It is Nairobi.", aliases) == "right"


def test_the_longest_alias_at_the_first_place_is_taken() -> None:
    """A claim of "New York City" is three words, whichever alias is listed first."""
    aliases = usable_aliases(["York", "New York", "New York City"], "Where?")
    text = "It lies in New York City, New York."
    span = find_alias(text, aliases)
    assert span is not None
    assert text[slice(*span)] == "New York City"


@pytest.mark.parametrize(
    "text",
    [
        "I don't know.",
        "I do not know",
        "I\N{RIGHT SINGLE QUOTATION MARK}m not sure about that",
        "I'm sorry, but I cannot answer that.",
        "Sorry, no idea",
        "As an AI language model, I have no opinion",
        "The answer is unknown.",
        "There is no information available",
        "The country of Caen is not a place.",
        "It isn't clear",
        "",
        "...",
    ],
)
def test_a_refusal_or_an_evasion_is_neither_right_nor_wrong(text: str) -> None:
    """Trap 4: the reference lists four phrases; "I do not know" passed as a wrong answer."""
    assert abstains(text)
    assert judge(text, [("warsaw",)]) == "abstained"


@pytest.mark.parametrize(
    "text",
    [
        "Penguins cannot fly to Warsaw",
        "The Unknown Soldier",
        "Notting Hill",
        "Knowles",
        "She did not win; Warsaw did",
        "A sore subject",
    ],
)
def test_an_innocent_word_is_no_abstention(text: str) -> None:
    """Trap 4: the reference drops every answer that contains "cannot"."""
    assert not abstains(text)
