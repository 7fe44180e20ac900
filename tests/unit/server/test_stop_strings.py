"""Stop strings over pieces, against a search in the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.stop_strings import StopStrings

LETTERS = st.text("ab", max_size=3)


def first_cut(pieces, strings):
    """The same rule, written over prefixes of the whole text: piece by piece, slowly."""
    text = ""
    for piece in pieces:
        text += piece
        ends = [(text.find(s) + len(s), i) for i, s in enumerate(strings) if s in text]
        if ends:
            end, i = min(ends)
            return end - len(strings[i])
    return None


@given(
    pieces=st.lists(LETTERS, max_size=12),
    strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
)
def test_the_cut_does_not_depend_on_where_pieces_end(pieces, strings):
    """A stop string is usually spread over tokens."""
    stop = StopStrings(strings)
    cut = None
    for piece in pieces:
        cut = stop.push(piece)
        if cut is not None:
            break
    assert cut == first_cut(pieces, strings)


def test_the_string_that_completes_first_wins():
    """vLLM's rule; the first of the list would cut later and show what must not be seen."""
    assert StopStrings(["bcd", "ab"]).push("xabcd") == 1
    assert StopStrings(["abc", "c"]).push("xabc") == 1  # a tie goes to the first of the list


def test_what_may_still_be_cut_is_held():
    """One character less would show the beginning of a stop string, one more only delays."""
    assert StopStrings([]).held == 0
    assert StopStrings(["a"]).held == 0
    assert StopStrings(["a", "abcd"]).held == 3
