"""The committed `docs/openapi.json` is the schema of this server.

A change of the wire shows in review as a change of that file. To write it anew:
`python tests/contract/test_openapi.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

from server.app import create_api
from server.engines.fake import FakeEngine
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from server.service import Service

COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "openapi.json"


def current() -> str:
    engine = FakeEngine()
    service = Service(
        engine=engine,
        metrics=Metrics(model_name="fake"),
        served_names=("fake",),
        created=0,
    )
    schema = create_api(service, Lifecycle(health=engine.health, heartbeat=60)).openapi()
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def test_the_committed_schema_is_the_current_one():
    """Clients are generated from it; a silent change breaks them."""
    assert COMMITTED.read_text() == current(), f"write it anew: python {Path(__file__).name}"


def test_every_route_documents_its_errors_and_no_422():
    """FastAPI documents a 422 that this server never sends."""
    schema = json.loads(current())
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            if path.startswith("/v1/"):
                assert {"4XX", "5XX"} <= set(operation["responses"]), path


if __name__ == "__main__":
    COMMITTED.write_text(current())
