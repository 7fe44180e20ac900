"""Who asks reaches the engine, on every route: what it keeps of prompts is kept per API key."""

from __future__ import annotations

import httpx
import pytest

from server.app import create_app
from server.auth import hash_keys
from server.engines.fake import FakeEngine
from server.lifecycle import Lifecycle
from tests.contract.conftest import make_fake_service

BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "1969"}]},
    "/v1/completions": {"prompt": "1969"},
    "/v1/risk": {"messages": [{"role": "user", "content": "when?"}], "answer": "1969"},
}


class Listening(FakeEngine):
    """Remembers whose requests came."""

    def __init__(self) -> None:
        super().__init__()
        self.tenants: list[int] = []

    def generate(self, request):
        self.tenants.append(request.tenant)
        return super().generate(request)

    async def score(self, request):
        self.tenants.append(request.tenant)
        return await super().score(request)


@pytest.mark.parametrize("route", BODIES)
async def test_each_key_is_a_tenant(route):
    """Two keys must not share a cache; without keys everybody is the same tenant, 0."""
    engine = Listening()
    lifecycle = Lifecycle(health=engine.health, heartbeat=60)
    lifecycle.begin_serving()
    service = make_fake_service(engine)
    for hashes, keys in (((), ("", "")), (hash_keys("one,two,one"), ("one", "two"))):
        app = create_app(service, lifecycle, api_key_hashes=hashes).asgi
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test"
        ) as client:
            for key in keys:
                client.headers["authorization"] = f"Bearer {key}"
                answer = await client.post(route, json={"model": "fake", **BODIES[route]})
                assert answer.status_code == 200, answer.text
    assert engine.tenants == [0, 0, 1, 2]
