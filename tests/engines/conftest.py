"""One server of each engine, as a user starts it: the demo model, its shipped probe, real HTTP.

vLLM compiles for a minute, so that all modules of this folder share the server; the last test of
`test_service.py` ends it.
"""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.on_vllm import ON_VLLM
from tests.running import RunningServer, running_server

CONTEXT = 1024
FLAGS = {
    "transformers": (),
    "vllm": ("--suppression", "--vllm-args", "--kv-cache-memory-bytes 512M"),
}
LIMITS = ("--max-model-len", str(CONTEXT), "--max-waiting-requests", "16", "--drain-timeout", "1")


@pytest.fixture(scope="session", params=["transformers", pytest.param("vllm", marks=ON_VLLM)])
def engine(request: pytest.FixtureRequest) -> str:
    """Value of `--engine`."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def context(engine: str) -> int:
    """Tokens that prompt and answer may have together.

    vLLM keeps one place free, for the pass that reads the last token.
    """
    return CONTEXT - 1 if engine == "vllm" else CONTEXT


@pytest.fixture(scope="session")
def server(
    engine: str,
    demo_model_path: object,
    vllm_cache: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp(engine)
    flags = ("--engine", engine, *FLAGS[engine], *LIMITS)
    with running_server(folder, "demo", *flags, seconds=600) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """The client that everybody has."""
    address = f"{server.address}/v1"
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120) as client:
        yield client
