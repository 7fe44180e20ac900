"""Does a text answer at all? Refusals, evasions, and the first sentence, by which it is judged."""

from __future__ import annotations

import re

from offline.words import APOSTROPHE, new_words, words

# First-person refusals and non-answers. A bare "cannot" is no abstention: "Penguins cannot fly".
_ABSTENTIONS = re.compile(
    r"""\b(?: i \s (?:do \s not|don't|have \s no) \s? (?:know|have|understand|idea|information)
          | i (?:'m|\s am) \s (?:not \s (?:sure|certain|aware|able|familiar)|un(?:sure|able)|afraid)
          | (?:i|we) \s (?:cannot|can't|could \s not|couldn't|can \s not)
          | (?:i'm|i \s am|we're|we \s are) \s sorry
          | as \s an \s (?:ai|artificial)
          | (?:is|are|was) \s (?:unknown|unclear|uncertain)
          | no \s (?:information|answer|data|idea) \b (?! \s (?:centre|center|science))
          | (?:nobody|no \s one) \s knows
          | not \s enough \s information
        ) | ^ \W* sorry \s? (?: [,.!] | but \b | $ )""",
    re.VERBOSE,
)
# "The country of Caen is not a place" claims nothing; frequent in small models.
_EVASION = re.compile(r"\b(?:is|are|was|were)(?: not|n't)\b")
_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n")
_ABBREVIATION = re.compile(r"\b[A-Z]\w{0,2}$")


def refuses(text: str) -> bool:
    """The text says nothing, or that it does not know: neither right nor wrong."""
    return not words(text) or bool(_ABSTENTIONS.search(_plain(text)))


def evades(text: str, question: str) -> bool:
    """The text answers, but names nothing: it denies the question ("is not a place") or says no
    more than it ("The sport of X is a sport", "The genre of X is a genre of music"). That is wrong
    without a claim. A name said again does claim: "The country of Luxor is Luxor"."""
    opening = first_sentence(text)
    asked = {word.key for word in words(question)}
    new = new_words(words(opening), question)
    again = any(word.key in asked and not word.is_named for word in new)
    names = any(word.key not in asked and word.is_named for word in new)
    return not new or (again and not names) or bool(_EVASION.search(_plain(opening)))


def first_sentence(text: str) -> str:
    """Up to the stop or line break that ends the first sentence.

    A stop after a capitalised word of one to three letters is taken for an abbreviation ("St.").
    """
    lead = len(text) - len(text.lstrip())
    for match in _SENTENCE_END.finditer(text, lead):
        if match[0] != "." or not _ABBREVIATION.search(text, 0, match.start()):
            return text[: match.start()]
    return text


def _plain(text: str) -> str:
    return " ".join(text.replace(APOSTROPHE, "'").casefold().split())
