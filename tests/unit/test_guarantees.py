"""docs/guarantees.md says what the code does: limits, settings and routes."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from server.engines.fake import FakeEngine
from server.settings import Settings


@pytest.fixture(scope="module")
def guarantees(repository: Path) -> str:
    return (repository / "docs" / "guarantees.md").read_text()


def test_every_constant_has_the_documented_value(guarantees: str) -> None:
    """A limit that was raised in the code alone is a promise that was broken in silence."""
    rows = re.findall(r"^\| .+? \| ([\d,]+)[^|]*\| .+? \| `([\w.]+)` \|$", guarantees, re.MULTILINE)
    assert len(rows) >= 14
    for documented, dotted in rows:
        module, _, name = dotted.rpartition(".")
        assert float(documented.replace(",", "")) == getattr(import_module(module), name), dotted


def test_every_setting_has_the_documented_default(guarantees: str) -> None:
    """An operator plans with these numbers."""
    rows = re.findall(r"^\| `--([\w-]+)` \| ([\d.]+) \|", guarantees, re.MULTILINE)
    assert len(rows) >= 6
    for flag, documented in rows:
        assert documented == str(Settings.model_fields[flag.replace("-", "_")].default), flag


async def test_every_route_is_listed(guarantees: str) -> None:
    """A route that the table forgets is one that nobody thought about guarding."""
    from server.app import create_api
    from server.lifecycle import Lifecycle
    from server.metrics import Metrics
    from server.service import Service

    engine = FakeEngine()
    service = Service(
        engine=engine,
        metrics=Metrics(model_name="fake"),
        served_names=("fake",),
        created=0,
    )
    api = create_api(service, Lifecycle(health=engine.health, heartbeat=1.0))
    served = {
        f"{method} {route.path}".replace(":path}", "}")
        for route in api.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    listed = set(re.findall(r"`((?:GET|POST) /[^`]*)`", guarantees))
    assert served <= listed
    assert listed - served == {"GET /metrics", "GET /openapi.json", "GET /", "GET /playground/*"}
