"""The life of the process: drain, second signal, dead and hung engine, clients that leave or stall.

R18 engine death, R19 hang, R22 disconnects, R28 overload, R29 slow readers, R32 drain.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running import PATIENCE, OpenStream, ending, wait_until

FOREVER = "[slow:50][loop] tick tock "
MANY = {"max_tokens": 3000}


# --- drain ------------------------------------------------------------------------------------


def test_sigterm_drains(start_server: Any) -> None:
    """Prevents: F15, a listener that is closed at once and streams that are cut."""
    with start_server("--drain-delay", "3", "--drain-timeout", "4") as server:
        short = OpenStream(server, "[slow:100] this one ends in time, surely")
        long = [OpenStream(server, FOREVER, **MANY) for _ in range(5)]
        waiting: list[httpx.Response] = []
        whole = threading.Thread(target=lambda: waiting.append(server.chat(FOREVER, **MANY)))
        whole.start()
        wait_until(lambda: server.metric("hneurons_requests_running") == 7)
        server.process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        wait_until(lambda: server.client.get("/readyz").status_code == 503, 1)
        while time.monotonic() - told < 2:  # the listener is there for the drain delay
            with httpx.Client(base_url=server.client.base_url) as newcomer:
                refused = newcomer.post("/v1/chat/completions", json={})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert int(refused.headers["retry-after"]) > 0
            assert server.client.get("/livez").status_code == 200
            time.sleep(0.2)
        assert ending(short.finished()) == "stop"
        assert [ending(stream.finished()) for stream in long] == ["shutdown"] * 5
        whole.join(10)
        assert waiting[0].status_code == 503
        assert waiting[0].json()["error"]["code"] == "shutdown"
        assert server.wait(3 + 4 + 5 + PATIENCE) == 0
        assert time.monotonic() - told < 3 + 4 + 5 + 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_before_it_is_ready(number: signal.Signals) -> None:
    """The first process of a container ignores SIGTERM unless it says otherwise: the pod would wait
    for its whole grace period, and be ready meanwhile. SIGHUP would end a replica that starts."""
    script = "import server.serve, time; server.serve.serve = lambda *a, **k: time.sleep(60)"
    command = f"{script}\nprint('loading', flush=True)\nimport server.__main__ as m; m.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "demo", "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout
        process.stdout.readline()
        wait_until(lambda: handles(process.pid, signal.SIGTERM))
        process.send_signal(number)
        if number == signal.SIGHUP:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.terminate()
        assert process.wait(10) == 0


def handles(process: int, number: signal.Signals) -> bool:
    """Whether the process has a handler of its own for the signal."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (number - 1) & 1)


def test_an_idle_server_stops_at_once(start_server: Any) -> None:
    """Prevents: ctrl-C that takes as long as a drain nobody needs."""
    with start_server("--drain-delay", "60", "--drain-timeout", "60") as server:
        server.chat()  # leaves a connection that is kept alive
        server.process.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE) == 0


def test_a_second_signal_ends_it(start_server: Any) -> None:
    """Prevents: an operator who has to reach for kill -9."""
    with start_server("--drain-delay", "60", "--drain-timeout", "60") as server:
        stream = OpenStream(server, FOREVER, **MANY)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.client.get("/readyz").status_code == 503)
        server.process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        assert server.wait(PATIENCE) == 1
        assert time.monotonic() - told < 4  # 2 s on an idle machine
        assert ending(stream.finished()) == "shutdown"


# --- the engine -------------------------------------------------------------------------------


def test_a_dead_engine_ends_streams_and_process(start_server: Any) -> None:
    """Prevents: an API that says 200 while the engine is dead, and exit code 0."""
    with start_server() as server:
        streams = [OpenStream(server, FOREVER, **MANY) for _ in range(3)]
        failed = server.chat("[die:3] abcdef")
        assert failed.status_code == 503
        assert failed.json()["error"]["code"] == "engine_dead"
        assert [ending(stream.finished()) for stream in streams] == ["engine_dead"] * 3
        assert server.wait(30) == 4
        assert "engine dead" in server.log.read_text()


def test_a_hung_engine_ends_streams_and_process(start_server: Any) -> None:
    """Prevents: clients that wait for ever for a step that never comes."""
    with start_server("--heartbeat", "2", "--max-num-seqs", "2") as server:
        hung = OpenStream(server, "[hang:3] abcdef")
        whole: list[httpx.Response] = []
        reader = threading.Thread(target=lambda: whole.append(server.chat("[hang:1] x")))
        reader.start()
        assert ending(hung.finished()) == "engine_dead"
        reader.join(PATIENCE)
        assert whole[0].status_code == 503
        assert server.wait(30) == 4


def test_one_failed_request_leaves_the_others_alone(server: Any) -> None:
    """Prevents: I12, a request whose error changes or ends its neighbours."""
    good = OpenStream(server, "[slow:50] a calm answer")
    assert ending(OpenStream(server, "[fail:3] abcdef").finished()) == "nonfinite_logits"
    failed = server.chat("[fail:3] abcdef")
    assert failed.status_code == 500
    assert failed.json()["error"]["code"] == "nonfinite_logits"
    assert ending(good.finished()) == "stop"
    assert server.chat().status_code == 200


# --- clients ----------------------------------------------------------------------------------


def running(server: Any) -> float:
    return float(server.metric("hneurons_requests_running"))


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_frees_its_slot(server: Any, is_streamed: bool) -> None:
    """Prevents: F8, F9, a generation that goes on for nobody."""
    wait_until(lambda: running(server) == 0)
    before = server.metric("hneurons_aborted_requests_total")
    socks = [server.raw(server.chat_bytes(FOREVER, stream=is_streamed, **MANY)) for _ in range(10)]
    wait_until(lambda: running(server) == 10)
    for sock in socks:
        sock.close()
    assert wait_until(lambda: running(server) == 0) < 5  # 1 s on an idle machine
    wait_until(lambda: server.metric("hneurons_aborted_requests_total") == before + 10)


def test_a_waiting_client_that_leaves_frees_the_queue(start_server: Any) -> None:
    """Prevents: TGI's dropped receiver that stays in the queue."""
    with start_server("--max-num-seqs", "1") as server:
        first = OpenStream(server, FOREVER, max_tokens=200)
        sock = server.raw(server.chat_bytes(FOREVER, stream=True, **MANY))
        wait_until(lambda: server.metric("hneurons_requests_waiting") == 1)
        sock.close()
        wait_until(lambda: server.metric("hneurons_requests_waiting") == 0)
        assert ending(first.finished()) == "length"


@pytest.mark.parametrize(
    "flags", [("--max-waiting-requests", "2"), ("--max-waiting-tokens", "130")]
)
def test_a_full_queue_is_a_429(start_server: Any, flags: tuple[str, str]) -> None:
    """Prevents: F6 and vLLM #2901, a queue without a bound, by requests or by tokens."""
    with start_server("--max-num-seqs", "1", *flags) as server:
        socks = [server.raw(server.chat_bytes(FOREVER, stream=True, **MANY)) for _ in range(1)]
        wait_until(lambda: running(server) == 1)
        socks += [server.raw(server.chat_bytes(FOREVER, stream=True, **MANY)) for _ in range(2)]
        wait_until(lambda: server.metric("hneurons_requests_waiting") == 2)
        for is_streamed in (False, True):
            started = time.monotonic()
            refused = server.chat(FOREVER, stream=is_streamed)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "overloaded"
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert int(refused.headers["retry-after"]) > 0
            assert time.monotonic() - started < 2
        assert 'rejected_requests_total{model_name="m",reason="overloaded"} 2.0' in (
            server.client.get("/metrics").text
        )
        assert server.client.get("/readyz").status_code == 200
        for sock in socks:
            sock.close()
        wait_until(lambda: running(server) == 0)
        assert server.chat().status_code == 200


def test_a_slow_reader_is_cut_off(server: Any) -> None:
    """Prevents: R29, an answer of megabytes that waits in memory for a client who never reads."""
    wait_until(lambda: running(server) == 0)
    before = server.memory_mib()
    body = {"max_tokens": 3500, "n": 8, "risk": {"contributors": 10}, "logprobs": True}
    body["top_logprobs"] = 20
    payload = server.chat_bytes("[loop] tick 1 tock 2 ", stream=True, **body)
    socks = []
    for _ in range(4):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(payload)
        socks.append(sock)
    wait_until(lambda: running(server) > 0)
    assert 20 < wait_until(lambda: running(server) == 0, 70) < 70
    assert server.metric("hneurons_aborted_requests_total") > 0
    assert server.memory_mib() - before < 32
    assert server.chat().status_code == 200
    for sock in socks:
        sock.close()


def test_idle_sockets_are_no_lever(server: Any) -> None:
    """Prevents: F6, a limit on connections that a handful of idle sockets fill."""
    socks = [server.raw() for _ in range(300)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.chat().status_code, range(20)))
    assert answers == [200] * 20
    for sock in socks:
        sock.close()


def test_keep_alive_serves_the_next_request(server: Any) -> None:
    """Prevents: a deadline of ours that cuts a healthy connection."""
    with httpx.Client(base_url=server.client.base_url, timeout=30) as client:
        for _ in range(3):
            assert client.get("/livez").status_code == 200
            time.sleep(2)
    long = OpenStream(server, "[slow:400][loop] tick ", max_tokens=32)
    assert ending(long.finished()) == "length"  # 13 s, longer than any deadline for headers
