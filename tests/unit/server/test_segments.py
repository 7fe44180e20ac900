"""Tokens of an answer in the fields that a client sees, whatever their borders are."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.monitor import Token
from server.plain_parsers import PlainParser
from server.segments import Segmenter

TEXT = (
    "<think>Is it 7? a<b</think>It is 7 </thin>k."
    '<tool_call>{"name": "f", "arguments": {"a": "}"}}</tool_call>'
    '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
)


def tokens_of(parts, flagged=()):
    """One token per part, as a monitor gives them: offsets in the whole text, flags by number."""
    tokens, start = [], 0
    for i, part in enumerate(parts):
        end = start + len(part)
        tokens.append(Token(i, part, start, end, risk=0.5, is_flagged=i in flagged and part != ""))
        start = end
    return tokens


def segmenter(*, stops=False, is_open=True):
    return Segmenter(PlainParser(is_open=is_open, parses_calls=True), stops=stops)


def play(made, parts, flagged=()):
    """All pieces, token by token, and the tokens that are left for the end."""
    pieces = []
    for token in tokens_of(parts, flagged):
        pieces += made.push([token])
        if made.is_stopped:
            return pieces, ()
    more, rest = made.finish([])
    return pieces + more, rest


def text_of(pieces, segment, call=None):
    return "".join(piece.text for piece in pieces if piece.field == (segment, call))


def places(tokens):
    return [(token.segment, token.start, token.end, token.text) for token in tokens]


def test_each_token_stands_where_its_text_is():
    """A tint at the wrong characters, or in the wrong field, is a wrong risk."""
    parts = ["<think>", "so ", "7", "</think>", "It ", "is", ""]
    made = segmenter()
    pieces, rest = play(made, parts)
    assert [(piece.segment, piece.text) for piece in pieces] == [
        *[("reasoning", "so "), ("reasoning", "7"), ("content", "It "), ("content", "is")]
    ]
    assert places(made.tokens) == [
        ("reasoning", 0, 0, ""),  # the marker belongs to what comes next
        ("reasoning", 0, 3, "so "),
        ("reasoning", 3, 4, "7"),
        ("content", 0, 0, ""),
        ("content", 0, 3, "It "),
        ("content", 3, 5, "is"),
        ("content", 5, 5, ""),
    ]
    assert len(rest) == 1


def test_a_token_of_two_fields_belongs_to_the_second():
    """Its first part is sent, under no token; nothing is lost and nothing stands twice."""
    made = segmenter()
    pieces, _ = play(made, ["so", " 7</think>It", " is"], flagged=[1])
    assert text_of(pieces, "reasoning") == "so 7"
    assert text_of(pieces, "content") == "It is"
    assert places(made.tokens) == [
        ("reasoning", 0, 2, "so"),
        ("content", 0, 2, "It"),
        ("content", 2, 5, " is"),
    ]
    assert [piece.tokens for piece in pieces[1:2]] == [()]
    assert made.tokens[1].is_flagged


def test_what_is_held_back_comes_out_with_the_token_that_decides_or_at_the_end():
    """`<` may begin a marker: its text waits for the next token, or for the end of the answer."""
    made = segmenter()
    pieces, _ = play(made, ["a", "<", "b"])
    assert [piece.text for piece in pieces] == ["a", "<b"]
    assert places(made.tokens)[1:] == [("reasoning", 1, 1, ""), ("reasoning", 1, 3, "<b")]
    made = segmenter()
    pieces, rest = play(made, ["a", "</", ""])
    assert text_of(pieces, "reasoning") == "a</"
    assert places(made.tokens)[1:] == [("reasoning", 1, 3, "</"), ("reasoning", 3, 3, "")]
    assert [token.token_id for token in rest] == [2]


def test_a_marker_is_never_flagged():
    """Its text is not seen: a flag on it could be shown nowhere."""
    made = segmenter()
    play(made, ["<think>", "a", "</think>", "b"], flagged=[0, 2])
    assert [token.is_flagged for token in made.tokens] == [False] * 4


def test_the_policy_stop_ends_with_the_first_flagged_token_of_the_answer():
    """A flag in the reasoning stops nothing; what is written after the flag is dropped."""
    made = segmenter(stops=True)
    pieces, rest = play(made, ["a", "</think>", "b", "c", "d"], flagged=[0, 3])
    assert made.is_stopped
    assert [token.token_id for token in made.tokens] == [0, 1, 2, 3]
    assert (text_of(pieces, "reasoning"), text_of(pieces, "content"), rest) == ("a", "bc", ())


def test_nothing_comes_out_after_the_flag_that_stops():
    """Also when the tokens behind it came at the same time."""
    made = segmenter(stops=True, is_open=False)
    pieces = made.push(tokens_of(["a", "b", "c"], flagged=[1]))
    assert (text_of(pieces, "content"), len(made.tokens)) == ("ab", 2)


@pytest.mark.parametrize("together", [False, True])
def test_the_policy_stop_without_a_parser(together):
    """Also when several tokens come at once, as after a stop string that did not come."""
    made = Segmenter(None, stops=True)
    tokens = tokens_of(["a", "b", "c", ""], flagged=[1, 2])
    pieces = made.push(tokens) if together else [p for t in tokens[:2] for p in made.push([t])]
    assert made.is_stopped
    assert text_of(pieces, "content") == "ab"
    assert [token.token_id for token in made.tokens] == [0, 1]


def test_a_flag_among_the_last_tokens_stops_too():
    """With the reading of the last token the answer may have ended already."""
    made = Segmenter(None, stops=True)
    pieces, rest = made.finish(tokens_of(["a", "b", ""], flagged=[0]))
    assert (made.is_stopped, text_of(pieces, "content"), rest) == (True, "a", ())
    assert len(made.tokens) == 1


def test_a_token_of_a_call_points_into_its_arguments():
    """The name has no characters there: what writes it stands before them."""
    parts = [
        "<tool_call>",
        '{"name": "f"',
        ', "arguments": ',
        '{"a": ',
        '"7"',
        "}}",
        "</tool_call>",
    ]
    made = segmenter(is_open=False)
    pieces, _ = play(made, parts, flagged=[4, 5])
    assert [(piece.text, piece.call, piece.opens is not None) for piece in pieces] == [
        ('{"a": ', 0, True),
        ('"7"', 0, False),
        ("}", 0, False),
    ]
    assert [(t.segment, t.call, t.start, t.end, t.is_flagged) for t in made.tokens] == [
        *[("tool_call", 0, 0, 0, False)] * 3,
        ("tool_call", 0, 0, 6, False),
        ("tool_call", 0, 6, 9, True),
        ("tool_call", 0, 9, 10, True),
        ("tool_call", 0, 10, 10, False),
    ]


@given(st.lists(st.integers(0, len(TEXT)), max_size=30), st.booleans())
def test_any_borders_give_the_same_fields(cuts, at_once):
    """The tokenizer's borders are an accident: no text depends on them, no token is lost."""
    borders = [0, *sorted(cuts), len(TEXT)]
    parts = [TEXT[a:b] for a, b in pairwise(borders)]
    made = segmenter()
    if at_once:
        pieces, _ = made.finish(tokens_of(parts))
    else:
        pieces, _ = play(made, parts)
    assert text_of(pieces, "reasoning") == "Is it 7? a<b"
    assert text_of(pieces, "content") == "It is 7 </thin>k."
    assert [piece.opens.function for piece in pieces if piece.opens] == ["f", "g"]
    assert text_of(pieces, "tool_call", 0) == '{"a": "}"}'
    assert text_of(pieces, "tool_call", 1) == "{}"
    assert [token.token_id for token in made.tokens] == list(range(len(parts)))
    ends = {}
    for token in made.tokens:
        field = (token.segment, token.call)
        assert token.start >= ends.get(field, 0)
        ends[field] = token.end
        assert text_of(pieces, *field)[token.start : token.end] == token.text
