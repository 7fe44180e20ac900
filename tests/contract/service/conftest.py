"""A real server process with the fake engine, and raw sockets to talk to it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.running import RunningServer, answer_of, running_server

StartServer = Callable[..., AbstractContextManager[RunningServer]]


def _start(folder: Path, *flags: str, **options: object) -> AbstractContextManager[RunningServer]:
    return running_server(folder, "m", "--engine", "fake", *flags, **options)


@pytest.fixture
def start_server(tmp_path: Path) -> StartServer:
    """Starts a server of the test's own: `with start_server("--flag") as server`."""
    return lambda *flags, **options: _start(tmp_path, *flags, **options)


@pytest.fixture(scope="session")
def start_in() -> StartServer:
    """Like `start_server`, for fixtures of a wider scope: the first argument is a folder."""
    return _start


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One open server that hostile tests share; it must survive all of them."""
    with _start(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def answer() -> Callable[[socket.socket], bytes]:
    return answer_of
