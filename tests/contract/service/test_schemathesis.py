"""R01: schemathesis, positive and negative data over every documented route."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODEL_FIELDS = {
    "ChatRequest": {"const": "m"},
    "CompletionRequest": {"const": "m"},
    "ScoreTextRequest": {"enum": ["m", None]},
}


@pytest.mark.timeout(600)
def test_no_generated_request_breaks_the_api(start_server: Any, tmp_path: Path) -> None:
    """Prevents: a 500, a hang, an undocumented status or a body that is not of its schema.

    The model's name is pinned in a copy of the schema: with random names every request would end
    at its 404. `positive_data_acceptance` is left out, because rules between fields (one pair of
    texts, one limit, the context) cannot be said in a schema.
    """
    with start_server("--max-model-len", "200") as server:
        document = server.client.get("/openapi.json").json()
        for name, pinned in MODEL_FIELDS.items():
            document["components"]["schemas"][name]["properties"]["model"] = pinned
        schema = tmp_path / "openapi.json"
        schema.write_text(json.dumps(document))
        finished = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", str(schema)),
                *("--url", str(server.client.base_url), "--seed", "1", "--no-color"),
                *("--mode", "all", "--phases", "examples,coverage,fuzzing"),
                *("--max-examples", "80", "--max-response-time", "20", "--request-timeout", "30"),
                *("--checks", "all", "--exclude-checks", "positive_data_acceptance"),
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=500,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]
        found = re.search(r"(\d+) generated", finished.stdout)
        assert found
        assert int(found[1]) >= 1000, finished.stdout[-1000:]
        # Not only refusals: some of the generated requests must have been served.
        assert server.metric("hneurons_requests_total") > 20
        assert server.chat().status_code == 200
        assert '"level": "ERROR"' not in server.log.read_text()
