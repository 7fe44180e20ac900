"""Tokens into pieces of text: each piece is of one field that the client sees.

A token belongs to the field whose text it adds to, at the characters that it adds there. A token
without visible text (markup, text that is held back) belongs where the next one does, at the end
where the last one did. Where one token adds to two fields it belongs to the second, and the text
of the first goes out under no token. Knows nothing of the wire.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from server.monitor import Token
from server.parsing import Delta, Parser, Segment, ToolCall

Field: TypeAlias = tuple[Segment, int | None]  # a segment, and which call where it is one


class Piece(NamedTuple):
    """Text that goes out and the tokens that carry it.

    call, opens  as in `Delta`: the tool call whose arguments the text is of, and its name
    """

    text: str
    tokens: tuple[Token, ...]
    segment: Segment = "content"
    call: int | None = None
    opens: ToolCall | None = None

    @property
    def field(self) -> Field:
        return self.segment, self.call


class Segmenter:
    """One choice. Without a parser all text is content, and tokens stay as they are."""

    def __init__(self, parser: Parser | None, *, stops: bool) -> None:
        """`stops`: the first flagged token of the answer is the last one that comes out."""
        self.tokens: list[Token] = []  # all that have come out
        self.is_stopped = False
        self._parser = parser
        self._stops = stops
        self._held: list[Token] = []  # their field is not known yet
        self._field: Field = ("content", None)  # of the newest piece
        self._lengths: defaultdict[Field, int] = defaultdict(int)  # code points
        self.has_calls = False

    def push(self, tokens: Sequence[Token]) -> list[Piece]:
        """What these tokens let out; the last of them has text."""
        if self._parser is None:
            return self._out(_piece(tokens)) if tokens else []
        pieces = []
        for token in tokens:
            assert token.token_id is not None
            pieces += self._placed(self._parser.push(token.text, token.token_id), token)
        return self._out(*pieces)

    def finish(self, tokens: Sequence[Token]) -> tuple[list[Piece], tuple[Token, ...]]:
        """What the last tokens let out, and those of them that carry no text."""
        if self._parser is None:
            count = _with_text(tokens)
            pieces, rest = self.push(tokens[:count]), tuple(tokens[count:])
        else:
            pieces = self.push(tokens)
            count = _with_text(self._held)
            after, self._held = self._held[count:], self._held[:count]
            owner = self._held.pop() if self._held else None
            pieces += self._out(*self._placed(self._parser.finish(), owner))
            rest = tuple(self._at_end(token) for token in (*self._held, *after))
        if self.is_stopped:
            rest = ()
        self.tokens += rest
        return pieces, rest

    def _placed(self, deltas: Sequence[Delta], token: Token | None) -> list[Piece]:
        """One piece per delta; the last one is the token's, the first one of those held before."""
        if not deltas:
            self._held += [token] if token is not None else []
            return []
        pieces = []
        for number, delta in enumerate(deltas, start=1):
            self._field = field = (delta.segment, delta.call)
            self.has_calls |= delta.opens is not None
            before = [self._at_end(held) for held in self._held]
            self._held = []
            start = self._lengths[field]
            self._lengths[field] = start + len(delta.text)
            if token is not None and number == len(deltas):
                before.append(_place(token, field, start, delta.text))
            pieces.append(Piece(delta.text, tuple(before), *field, delta.opens))
        return pieces

    def _at_end(self, token: Token) -> Token:
        """Without text, where the newest piece ends."""
        return _place(token, self._field, self._lengths[self._field], "")

    def _out(self, *pieces: Piece) -> list[Piece]:
        """What goes out of these: nothing after a flag that stops the answer."""
        if len(pieces) == 1 and not self._stops:  # nearly every token
            self.tokens += pieces[0].tokens
            return [*pieces]
        out: list[Piece] = []
        for piece in pieces:
            if not self.is_stopped:
                out.append(self._until_flag(piece))
                self.tokens += out[-1].tokens
        return joined(out)

    def _until_flag(self, piece: Piece) -> Piece:
        if self._stops:
            for count, token in enumerate(piece.tokens, start=1):
                if token.is_flagged and token.segment != "reasoning":
                    self.is_stopped = True
                    shown = _piece(piece.tokens[:count])
                    return piece._replace(text=shown.text, tokens=shown.tokens)
        return piece


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one field in one piece."""
    out: list[Piece] = []
    for piece in pieces:
        if out and out[-1].field == piece.field:
            last = out.pop()
            piece = last._replace(text=last.text + piece.text, tokens=last.tokens + piece.tokens)
        out.append(piece)
    return out


def _place(token: Token, field: Field, start: int, text: str) -> Token:
    """The token with what it adds to a field at `start`."""
    segment, call = field
    return token._replace(
        text=text,
        start=start,
        end=start + len(text),
        segment=segment,
        call=call,
        is_flagged=token.is_flagged and text != "",
    )


def _piece(tokens: Iterable[Token]) -> Piece:
    tokens = tuple(tokens)
    return Piece("".join(token.text for token in tokens), tokens)


def _with_text(tokens: Sequence[Token]) -> int:
    """How many of the first tokens it takes to have all text."""
    return max((i + 1 for i, token in enumerate(tokens) if token.text), default=0)
