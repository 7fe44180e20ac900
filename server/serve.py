"""One run of the service: sockets, probes, engine, tests, listener, in that order.

What can be refused cheaply is refused before the model loads; the listener exists last.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from probes.probe import Probe
from server.app import create_app, create_metrics_app
from server.engines.base import Engine
from server.known_answer import check_probes
from server.lifecycle import Lifecycle
from server.process import SECONDS_FOR_LAST_WORDS, Listener, Server, bind
from server.protocol import DeadlineProtocol
from server.reload import Reload
from server.service import Service
from server.settings import BadSettingsError, Settings
from server.startup import find_key_hashes, find_model, find_probes, load_engine, make_service

SECONDS_TO_CLOSE = 2.0  # one forward pass on a busy CPU may take longer: it is given up

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Listening:
    """The bound sockets, and how to say that they accept."""

    main: socket.socket
    metrics: socket.socket | None
    announce: Callable[[str], None]


def serve(settings: Settings, *, announce: Callable[[str], None]) -> int:
    """Serve until told to stop; the exit code. HNeuronsError when it cannot start.

    `announce` is called once, with one line, when requests are accepted.
    """
    hashes = find_key_hashes(settings)
    probes = [Probe.load(path) for path in find_probes(settings)]
    with ExitStack() as stack:
        main = stack.enter_context(bind(settings.host, settings.port))
        metrics = None
        if settings.metrics_port is not None:
            metrics = stack.enter_context(bind(settings.host, settings.metrics_port))
        if not hashes and not settings.is_loopback:
            log.warning("no API keys are set and the address is not loopback: anyone can connect")
        model = find_model(settings)
        engine = load_engine(settings, model, probes)
        service = make_service(settings, engine, model)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            listening = _Listening(main, metrics, announce)
            return runner.run(_run(settings, service, hashes, listening))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed, as uvicorn would choose: vLLM brings it, and it saves time."""
    return uvicorn.Config(app="", loop="auto", log_config=None).get_loop_factory()


async def _run(
    settings: Settings, service: Service, hashes: Sequence[bytes], listening: _Listening
) -> int:
    engine = service.engine
    lifecycle = Lifecycle(health=engine.health, heartbeat=settings.heartbeat)
    playground = settings.playground
    if playground is None:
        playground = settings.is_loopback and not hashes
    app = create_app(
        service,
        lifecycle,
        api_key_hashes=hashes,
        allowed_origins=settings.allowed_origins,
        playground=playground,
        metrics_on_main_port=listening.metrics is None,
    )
    server = Server(
        _config(app.asgi, settings),
        lifecycle=lifecycle,
        gate=app.gate,
        drain_delay=settings.drain_delay,
        drain_timeout=settings.drain_timeout,
        on_ready=lambda: listening.announce(
            _ready_line(
                settings, service, listening.main, playground=playground, needs_key=bool(hashes)
            )
        ),
    )
    reload = Reload(service, find=lambda: find_probes(settings), open_now=app.gate.open_now)
    try:
        await check_probes(engine, engine.probes, suppression=settings.allows_alpha)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload.request)
        # What is there by now stays: a collection would walk all of it, and every stream would wait
        # for a third of a second (vLLM's server does the same).
        gc.collect()
        gc.freeze()
        async with _metrics_listener(settings, service, listening.metrics):
            await server.serve([listening.main])
    finally:
        await reload.close()
        await _close(engine)
        for recorder in service.recorders:
            recorder.close()
    return server.exit_code


@asynccontextmanager
async def _metrics_listener(
    settings: Settings, service: Service, bound: socket.socket | None
) -> AsyncIterator[None]:
    """`/metrics` on a port of its own, if there is one, until the block ends; HTTP, no key."""
    if bound is None:
        yield
        return
    listener = Listener(_config(create_metrics_app(service), settings, is_public=False))
    task = asyncio.create_task(listener.serve([bound]))
    try:
        yield
    finally:
        listener.should_exit = True
        await task


def _config(app: ASGIApp, settings: Settings, *, is_public: bool = True) -> uvicorn.Config:
    """uvicorn with its limits on: h11 (httptools has no header limit), no log of its own."""
    is_tls = is_public and settings.ssl_keyfile is not None
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=DeadlineProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        root_path=settings.root_path if is_public else "",
        timeout_graceful_shutdown=int(SECONDS_FOR_LAST_WORDS),
        ssl_keyfile=str(settings.ssl_keyfile) if is_tls else None,
        ssl_certfile=str(settings.ssl_certfile) if is_tls else None,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise BadSettingsError(
            f"ssl_certfile, ssl_keyfile: cannot be used: {error.strerror or 'not PEM'}"
        ) from error
    return config


async def _close(engine: Engine) -> None:
    try:
        async with asyncio.timeout(SECONDS_TO_CLOSE):
            await engine.aclose()
    except TimeoutError:
        log.error("the engine did not stop in time")


def _ready_line(
    settings: Settings,
    service: Service,
    bound: socket.socket,
    *,
    playground: bool,
    needs_key: bool,
) -> str:
    """Where to look and what to type."""
    scheme = "http" if settings.ssl_certfile is None else "https"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    address = f"{scheme}://{host}:{bound.getsockname()[1]}"  # not through a proxy: no root_path
    request: dict[str, object] = {
        "model": service.model_name,
        "messages": [{"role": "user", "content": "Who wrote Hamlet?"}],
    }
    if service.default_probe is not None:
        request["risk"] = True
    page = f"playground: {address}/   " if playground else ""
    key = "-H 'Authorization: Bearer KEY' " if needs_key else ""
    return (
        f"hneurons is ready   {page}try: curl {address}/v1/chat/completions "
        f"{key}-H 'Content-Type: application/json' -d '{json.dumps(request)}'"
    )
