"""Pieces of chunked bodies, which go around h11's state machine, are those that h11 would write."""

import h11
import pytest

from server.protocol import Connection

CHUNKED = [(b"content-type", b"text/event-stream")]  # without a length: h11 chunks it
SIZED = [(b"content-length", b"5")]
PIECES = [b"data: {}\n\n", b"x" * 300, b"", "ü\U0001f600".encode()]


def written(kind: type[h11.Connection], request: bytes, headers, pieces) -> list[bytes]:
    connection = kind(h11.SERVER)
    connection.receive_data(request)
    while type(connection.next_event()) is not h11.EndOfMessage:
        pass
    events = [
        h11.Response(status_code=200, headers=headers),
        *(h11.Data(data=piece) for piece in pieces),
        h11.EndOfMessage(),
    ]
    return [connection.send(event) for event in events]


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize(("headers", "pieces"), [(CHUNKED, PIECES), (SIZED, [b"12", b"345"])])
def test_every_response_is_h11s_to_the_byte(version, method, headers, pieces):
    request = method + b" / HTTP/" + version + b"\r\nHost: h\r\n\r\n"
    if method == b"HEAD":
        pieces = [b""] * len(pieces)  # as uvicorn sends them
        headers = CHUNKED
    ours, theirs = (
        written(kind, request, headers, pieces) for kind in (Connection, h11.Connection)
    )
    assert ours == theirs


def test_a_second_response_on_the_connection_begins_anew():
    """The first one's framing must not outlive it."""
    connection = Connection(h11.SERVER)
    sent = []
    for headers, piece in ((CHUNKED, b"abc"), (SIZED, b"12345")):
        connection.receive_data(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        while type(connection.next_event()) is not h11.EndOfMessage:
            pass
        connection.send(h11.Response(status_code=200, headers=headers))
        sent.append(connection.send(h11.Data(data=piece)))
        connection.send(h11.EndOfMessage())
        connection.start_next_cycle()
    assert sent == [b"3\r\nabc\r\n", b"12345"]


def test_a_piece_after_the_end_is_refused():
    """As by h11: two answers on one wire would be read as one."""
    connection = Connection(h11.SERVER)
    connection.receive_data(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    while type(connection.next_event()) is not h11.EndOfMessage:
        pass
    connection.send(h11.Response(status_code=200, headers=CHUNKED))
    connection.send(h11.EndOfMessage())
    with pytest.raises(h11.LocalProtocolError):
        connection.send(h11.Data(data=b"late"))
