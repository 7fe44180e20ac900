"""The deadlines that uvicorn lacks, and its refusals in our shape.

A socket that owes us bytes (headers that never end, a refused body that goes on) and one that does
not take ours are closed. Bodies that the application reads have their deadline in limits.py.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.errors import APIError
from server.limits import MAX_HEADER_BYTES

SECONDS_TO_RECEIVE = 10.0  # for all headers of a request, or the rest of a refused body
# Without the client taking what waits for it. Later than the stream's own limit (sse.py), which
# knows why it aborts; this one frees the socket, whatever was being sent.
SECONDS_TO_SEND = 35.0
SEND_BUFFER_BYTES = 64 * 1024  # of the kernel's; by default a slow reader parks megabytes there


class Connection(h11.Connection):
    """h11, but a piece of a chunked body is written without asking its state machine each time.

    That cost 6 % of the server's time per streamed token. A piece changes no state: only the
    response's head and its end do, and those go the usual way.
    """

    _is_chunked = False

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]
        """See h11."""
        if self._is_chunked and type(event) is h11.Data and self.our_state is h11.SEND_BODY:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data) if event.data else b""
        output = super().send(event)
        if type(event) is h11.Response and output is not None:
            self._is_chunked = b"\r\ntransfer-encoding: chunked\r\n" in output.lower()
        return output


class DeadlineProtocol(H11Protocol):
    """h11 with a deadline on each side; one instance per connection."""

    seconds_to_receive = SECONDS_TO_RECEIVE
    seconds_to_send = SECONDS_TO_SEND
    _receiving: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.conn = Connection(h11.SERVER, MAX_HEADER_BYTES)
        super().connection_made(cast(asyncio.Transport, transport))
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._watch_receiving()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_receiving()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_receiving()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending = self.loop.call_later(self.seconds_to_send, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_sending()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_receiving()
        self._stop_sending()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What h11 cannot parse; also headers beyond the limit."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # an answer is under way: a second one would be worse
            return
        error = APIError(400, "the request is not valid HTTP", code="invalid_http")
        body = json.dumps(error.body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_receiving(self) -> None:
        """One deadline for the whole of what is owed: a drip does not extend it."""
        is_owed = self.conn.their_state is h11.IDLE or (
            self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete
        )
        if not is_owed:
            self._stop_receiving()
        elif self._receiving is None:
            self._receiving = self.loop.call_later(self.seconds_to_receive, self.transport.close)

    def _stop_receiving(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def _stop_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
