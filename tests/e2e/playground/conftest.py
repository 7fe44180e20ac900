"""A headless Chromium, real server processes, and a page that reports what it should not do.

The browser is Debian's; playwright only drives it. Where it is absent the tests skip with a
sentence; in CI (CI=true) its absence is a failure.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Response,
    sync_playwright,
)

from tests.running import running_server

CHROMIUM_FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Per module, not per session: playwright's own loop would stand in the way of async tests."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        sentence = "no chromium on PATH: `apt-get install chromium` runs the playground's tests"
        if os.environ.get("CI"):
            pytest.fail(sentence)
        pytest.skip(sentence)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, chromium_sandbox=False, args=list(CHROMIUM_FLAGS)
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """`serve(MODEL, *flags, **environment)`: the address of a server's page."""
    with ExitStack() as servers:

        def start(model: str, *flags: str, **environment: str) -> str:
            folder = tmp_path_factory.mktemp("server")
            server = running_server(folder, model, *flags, environment=environment)
            return f"{servers.enter_context(server).address}/"

        yield start


@pytest.fixture(scope="session")
def fake(serve: Callable[..., str]) -> str:
    """Address of a server whose model repeats the user's text and hallucinates digits."""
    return serve("demo", "--engine", "fake")


@dataclass
class Visit:
    """One page and what it did that nobody asked for."""

    context: BrowserContext
    page: Page
    allowed: str
    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def console(self, message: ConsoleMessage) -> None:
        # Chromium itself reports every HTTP refusal (see `response`).
        known = re.search(f"Failed to load resource|{self.allowed}", message.text)
        if message.type in {"error", "warning"} and not known:
            self.complaints.append(f"{message.type}: {message.text}")

    def response(self, response: Response) -> None:
        # A refusal by the API is shown in words; one of the page's own files is a bug.
        if response.status >= 400 and not urlsplit(response.url).path.startswith("/v1/"):
            self.complaints.append(f"{response.status} for {response.url}")


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open an address in a fresh context; afterwards: no console error, no foreign request."""
    visits: list[Visit] = []

    def open_page(
        address: str, *, width: int = 1440, height: int = 900, allowed: str = "$^", **options: str
    ) -> Page:
        """`allowed`: pattern of console messages that the test provokes."""
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(20_000)
        page = context.new_page()
        made = Visit(context, page, allowed)
        visits.append(made)
        page.on("console", made.console)
        page.on("response", made.response)
        page.on("pageerror", lambda error: made.complaints.append(str(error)))
        page.on("request", lambda request: made.hosts.add(urlsplit(request.url).hostname or ""))
        page.add_init_script(SHIFT_OBSERVER)
        page.goto(address)
        return page

    yield open_page
    for made in visits:
        made.context.close()
        assert made.complaints == []
        assert made.hosts == {"127.0.0.1"}


# How far the page's content jumps by itself, as Chromium measures it.
SHIFT_OBSERVER = """
globalThis.layoutShift = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) globalThis.layoutShift += entry.value;
}).observe({ type: "layout-shift", buffered: true });
"""
