"""Right, wrong or no answer: every near miss here was a wrong label in the reference code."""

from __future__ import annotations

import pytest

from offline.evasion import evades, first_sentence, refuses
from offline.judge import (
    ABSTAINED,
    DENIED,
    HEDGED,
    LATE,
    NEAR,
    NEITHER,
    NO_ALIAS,
    PART,
    Case,
    Judgement,
    RuleJudge,
    by_alias,
    by_exact,
    by_regex,
    find_alias,
    usable_aliases,
)
from offline.records import RecordError


def _case(text: str, gold: str = "Warsaw", question: str = "The capital of Poland is") -> Case:
    return Case("set/ask/q1/0", question, tuple(gold.split("|")), text)


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
        ("1,912 people", "1912", True),
        ("1,912 people", "912", False),
        ("born in the 1990s", "1990", False),
        ("in the U.S.", "US", True),
        ("in the US.", "U.S.", True),
        ("twelve men", "12", True),
        ("one of them", "1", False),
        ("two euros", "euro", True),
        ("a glass", "glas", False),
        ("rock & roll", "rock and roll", True),
        ("at the SAP Center", "the SAP Center", True),
        ("SAP Center", "the SAP Center", True),
        ("a rock band", "The Band", False),
        ("東京都", "東京", True),
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
    case = Case("q", question, ("Capital of Kenya", "Nairobi"), "The capital of Kenya is Mombasa.")
    assert by_alias(case).verdict == "wrong"
    assert by_alias(case._replace(text="It is Nairobi.")).verdict == "right"
    first = Case("q", "Jupiter is which planet's neighbour?", ("Jupiter", "Saturn"), "Jupiter's.")
    assert usable_aliases(first.gold, first.question) == [("saturn",)]  # also as its first word
    assert by_alias(case._replace(gold=("Capital of Kenya",))) == Judgement("unjudged", NO_ALIAS)


@pytest.mark.parametrize(
    ("text", "verdict", "reason"),
    [
        ("The capital of Poland is Warsaw.", "right", ""),
        ("The capital of Poland is Krakow.", "wrong", ""),
        ("Never Warsaw: Krakow.", "unjudged", DENIED),
        ("Krakow rather than Warsaw.", "unjudged", DENIED),
        ("Never Krakow, always Warsaw.", "right", ""),
        ("Krakow or Warsaw.", "unjudged", HEDGED),
        ("Krakow and Warsaw.", "unjudged", HEDGED),
        ("Warsaw, and it is large.", "right", ""),
        ("It is New Warsaw.", "unjudged", PART),
        ("It is Warsaw Radom.", "unjudged", PART),
        ("It is Warsaw, Poland.", "right", ""),
        ("It is Krakow. Warsaw is larger.", "unjudged", LATE),
        ("The Varsovian one, Warsawa.", "unjudged", NEAR),
        ("The capital of Poland is a capital.", "wrong", ""),
        ("The capital of Poland is not a place.", "wrong", ""),
        ("It is not Krakow but Warsaw.", "right", ""),
        ("I don't know.", "abstained", ABSTAINED),
    ],
)
def test_what_cannot_be_told_is_neither_right_nor_wrong(
    text: str, verdict: str, reason: str
) -> None:
    """A label that is a guess teaches the guess; each reason is counted apart."""
    assert by_alias(_case(text)) == Judgement(verdict, reason)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("No.", "no"),
        ("no", "no"),
        ("No, it is a fish.", "no"),
        ("The answer is no.", "no"),
        ("Yes, there is no doubt.", "yes"),
        ("There is no doubt.", ""),
        ("It is not.", ""),
        ("Yes and no", ""),
        ("It is a fish.", ""),
    ],
)
@pytest.mark.parametrize("gold", ["no", "No", "yes", "No, it is a fish|No"])
def test_a_yes_or_no_question_is_decided_by_what_opens_or_ends_the_answer(
    text: str, said: str, gold: str
) -> None:
    """ "No" was dropped as a short alias, so that half of such questions could not be used."""
    verdict = "right" if said == gold[-3:].strip("|").lower() else "wrong"
    expected = Judgement(verdict) if said else Judgement("unjudged", NEITHER)  # type: ignore[arg-type]
    assert by_alias(_case(text, gold, "Does the whale have gills?")) == expected


def test_no_is_no_answer_where_it_cannot_be_one() -> None:
    """An alias of Noh drama: "there is no such word" would be right."""
    assert usable_aliases(["No", "Noh"], "Which drama is masked?") == [("noh",)]


@pytest.mark.parametrize(
    ("text", "evasive"),
    [
        ("The capital of Poland is not a place.", True),
        ("The capital isn't clear", True),
        ("The capital of Poland is a capital.", True),
        ("The capital of Poland is the capital of the country.", True),
        ("The capital of Poland is", True),
        ("of the", True),
        ("The capital of Poland is Poland.", False),
        ("The capital of Poland is the capital of Masovia.", False),
        ("The capital of Poland is Krakow. It is not large.", False),
    ],
)
def test_an_evasion_is_wrong_and_claims_nothing(text: str, evasive: bool) -> None:
    """ "The sport of X is a sport" has no words to mark: as a claim it teaches its template."""
    assert evades(text, "The capital of Poland is") is evasive
    assert by_alias(_case(text)) == Judgement("wrong")


@pytest.mark.parametrize(
    ("gold", "text", "verdict"),
    [
        ("William Shakespeare", "It was Shakespeare.", "unjudged"),
        ("Emma Watson", "It was Daniel Radcliffe.", "wrong"),
        ("Catholicism", "It is Roman Catholic.", "unjudged"),
        ("9 October 1986", "In October 1991", "wrong"),
        ("9 October 1986", "In 1986", "unjudged"),
        ("State of Illinois", "It is the state of Ohio.", "wrong"),
    ],
)
def test_an_answer_that_is_near_an_accepted_one_is_no_wrong_answer(
    gold: str, text: str, verdict: str
) -> None:
    """Wrong answers abound; one that is right in other words would teach the opposite."""
    assert by_alias(_case(text, gold, "Which was it?")).verdict == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Warsaw", "right"),
        ("the Warsaw.", "right"),
        ("It is Warsaw", "right"),
        ("It is in Warsaw Radom", "wrong"),
        ("Krakow", "wrong"),
        ("I don't know", "abstained"),
    ],
)
def test_exact_wants_the_whole_answer(text: str, verdict: str) -> None:
    assert by_exact(_case(text)).verdict == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("in 1944", "right"), ("in 1954", "wrong"), ("about 19444", "wrong"), ("", "abstained")],
)
def test_regex_reads_accepted_answers_as_patterns(text: str, verdict: str) -> None:
    case = _case(text, r"\b194[0-9]\b", "When?")
    assert RuleJudge("regex").judge([case, case])[1].verdict == verdict


def test_a_bad_pattern_is_named_with_its_answer() -> None:
    with pytest.raises(RecordError, match=r"set/ask/q1/0.*'\('"):
        by_regex(_case("Warsaw", "("))


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
        "I have no idea",
        "Sorry.",
        "Sorry, but that is hard",
        "I do not know",
        "I\N{RIGHT SINGLE QUOTATION MARK}m not sure about that",
        "I'm sorry, but I cannot answer that.",
        "Sorry, no idea",
        "As an AI language model, I have no opinion",
        "The answer is unknown.",
        "There is no information available",
        "",
        "...",
    ],
)
def test_a_refusal_is_neither_right_nor_wrong(text: str) -> None:
    """Trap 4: the reference lists four phrases; "I do not know" passed as a wrong answer."""
    assert refuses(text)
    assert by_alias(_case(text)) == Judgement("abstained", ABSTAINED)


@pytest.mark.parametrize(
    "text",
    [
        "Penguins cannot fly to Warsaw",
        "The Unknown Soldier",
        "Notting Hill",
        "Knowles",
        "She did not win; Warsaw did",
        "A sore subject",
        "Sorry Seems to Be the Hardest Word",
        "It is Warsaw. It is not large",
    ],
)
def test_an_innocent_word_is_no_abstention(text: str) -> None:
    """Trap 4: the reference drops every answer that contains "cannot"."""
    assert not refuses(text)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Paris. It is big.", "Paris"),
        ("St. Louis it is. It", "St. Louis it is"),
        ("J. S. Bach", "J. S. Bach"),
        ("One\nTwo", "One"),
        ("In 1912. Then", "In 1912"),
        ("No stop", "No stop"),
    ],
)
def test_the_first_sentence_ends_at_a_stop_but_not_at_an_abbreviation(
    text: str, first: str
) -> None:
    assert first_sentence(text) == first
