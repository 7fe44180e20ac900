"""What every test may use. The environment is theirs alone: no hub, no settings from outside."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# CI draws the same examples every time, so that a red run can be repeated; elsewhere they vary.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("local", deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    """Before any import: huggingface_hub reads its switches only then."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting of the person who runs the tests never decides a test (the cache folder may)."""
    for name in os.environ:
        if name.startswith("HNEURONS_") and name != "HNEURONS_CACHE":
            monkeypatch.delenv(name)


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """A server takes the log over, as a process may and a test may not."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("server", "probes"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the working tree."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data(repository: Path) -> Path:
    """Folder of question files beside the repository; not part of the product."""
    folder = repository.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the question files (../shared/data) do not lie beside this repository")
    return folder


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """Folder of the demo model; the first call on a machine fetches and converts it (a minute)."""
    from server.demo_model import ensure_demo_model

    return ensure_demo_model()


@pytest.fixture(scope="session")
def vllm_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one engine has compiled serves the next; another session's work decides no test."""
    os.environ.setdefault("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("vllm-cache")))
