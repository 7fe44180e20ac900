"""`python -m server MODEL`, also `hneurons-serve`: settings in, exit code out.

0 stopped as asked, 1 refused to start or forced to stop, 2 wrong usage, 3 a probe does not fit,
4 the engine died or hung.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

import uvicorn
from starlette.types import ASGIApp

from probes.errors import HNeuronsError, ProbeError
from probes.probe import Probe
from server.app import create_app, create_metrics_app
from server.engines.base import Engine
from server.known_answer import check_probes
from server.lifecycle import Lifecycle
from server.limits import MAX_HEADER_BYTES
from server.logs import configure_logging
from server.process import SECONDS_FOR_LAST_WORDS, Listener, Server, bind, exit_anyway
from server.protocol import DeadlineProtocol
from server.service import Service
from server.settings import BadSettingsError, Settings, read_settings
from server.startup import find_key_hashes, find_model, find_probes, load_engine, make_service

EXIT_REFUSED = 1
EXIT_PROBE = 3
SECONDS_FOR_THREADS = 5.0

log = logging.getLogger("server")


def main() -> None:
    """The console script."""
    code = run(sys.argv[1:])
    exit_anyway(code, after=SECONDS_FOR_THREADS)  # a thread that hangs must not hold the process
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Serve until told to stop; the exit code."""
    if "--version" in arguments:
        print(version("hneurons"))
        return 0
    try:
        settings = read_settings(arguments)
        configure_logging(settings.log_level)
        return _start(settings)
    except HNeuronsError as error:
        print(f"hneurons: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_PROBE if isinstance(error, ProbeError) else EXIT_REFUSED


def _start(settings: Settings) -> int:
    """Cheap refusals first, then the model; the loop starts when the engine is there."""
    hashes = find_key_hashes(settings)
    probes = [Probe.load(path) for path in find_probes(settings)]
    with bind(settings.host, settings.port) as main_socket:
        if settings.metrics_port is None:
            return _load_and_serve(settings, hashes, probes, main_socket, None)
        with bind(settings.host, settings.metrics_port) as metrics_socket:
            return _load_and_serve(settings, hashes, probes, main_socket, metrics_socket)


def _load_and_serve(
    settings: Settings,
    hashes: tuple[bytes, ...],
    probes: Sequence[Probe],
    main_socket: socket.socket,
    metrics_socket: socket.socket | None,
) -> int:
    model = find_model(settings)
    engine = load_engine(settings, model, probes)
    service = make_service(engine, model, risk_by_default=settings.risk_by_default)
    if not hashes and not settings.is_loopback:
        log.warning("no API keys are set and the address is not loopback: anyone can connect")
    return asyncio.run(_serve(settings, hashes, service, main_socket, metrics_socket))


async def _serve(
    settings: Settings,
    hashes: tuple[bytes, ...],
    service: Service,
    main_socket: socket.socket,
    metrics_socket: socket.socket | None,
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
        metrics_on_main_port=metrics_socket is None,
    )
    server = Server(
        _config(app.asgi, settings),
        lifecycle=lifecycle,
        gate=app.gate,
        drain_delay=settings.drain_delay,
        drain_timeout=settings.drain_timeout,
        on_ready=lambda: _announce(settings, service, main_socket, playground=playground),
    )
    try:
        await check_probes(engine)
        if metrics_socket is None:
            await server.serve([main_socket])
        else:
            async with _metrics_listener(settings, service, metrics_socket):
                await server.serve([main_socket])
    finally:
        await _close(engine)
    return server.exit_code


@asynccontextmanager
async def _metrics_listener(
    settings: Settings, service: Service, listening: socket.socket
) -> AsyncIterator[None]:
    """`/metrics` on a port of its own, until the block ends; plain HTTP, no key."""
    listener = Listener(_config(create_metrics_app(service), settings, is_public=False))
    task = asyncio.create_task(listener.serve([listening]))
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
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        root_path=settings.root_path if is_public else "",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
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
        async with asyncio.timeout(SECONDS_FOR_THREADS):
            await engine.aclose()
    except TimeoutError:
        log.error("the engine did not stop in time")


def _announce(
    settings: Settings, service: Service, listening: socket.socket, *, playground: bool
) -> None:
    """The one line on stdout: where to look and what to type."""
    scheme = "http" if settings.ssl_certfile is None else "https"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    address = f"{scheme}://{host}:{listening.getsockname()[1]}{settings.root_path}"
    request: dict[str, object] = {
        "model": service.model_name,
        "messages": [{"role": "user", "content": "Who wrote Hamlet?"}],
    }
    if service.default_probe is not None:
        request["risk"] = True
    page = f"playground: {address}/   " if playground else ""
    print(
        f"hneurons is ready   {page}try: curl {address}/v1/chat/completions "
        f"-H 'Content-Type: application/json' -d '{json.dumps(request)}'",
        flush=True,
    )


if __name__ == "__main__":
    main()
