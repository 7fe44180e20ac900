"""The Dockerfile's own steps, taken by strangers: a user without rights installs, another serves.

No Docker engine is needed: RUN and COPY of the target `cpu` are read from the Dockerfile and done
in a folder that stands for the root of the image. Then the entry point serves the demo model where
it has no network, no capability and nothing to write on but its volumes. Not done: the base image,
and making the user.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

TARGET = "cpu"
BUILDER, SERVER = 10002, 10001  # uids; the second one is that of the Dockerfile's USER
FOLDERS = ("app", "build", "cache", "audit")  # of the image; here they lie in the root's stand-in
PIP_CONFIG = Path.home() / ".config" / "pip"
# In namespaces of its own: loopback alone, a read-only `/`, what the image calls volumes, `/tmp`.
CONTAINED = """
"$1" -c 'import fcntl, socket
fcntl.ioctl(socket.socket(), 0x8914, b"lo".ljust(16, b"\\0") + (1).to_bytes(24, "little"))' &&
mount -t tmpfs tmpfs /tmp && mount --bind "$2/cache" "$2/cache" &&
mount --bind "$2/audit" "$2/audit" && mount -o remount,bind,ro / && shift 2 && exec "$@"
"""


def as_user(uid: int) -> list[str]:
    """Prefix of a command that shall have no rights but those of `uid`."""
    rights = ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *rights, "--"]


def stages(dockerfile: str) -> dict[str, list[tuple[str, str]]]:
    """Stage -> its instructions, after those of the stage that it is built from."""
    text = re.sub(r"\\\n\s*", " ", dockerfile)
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in re.findall(r"^([A-Z]+) (.+)$", text, re.MULTILINE):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = list(found.get(base, ()))
        elif name:
            found[name].append((word, rest))
    return found


class Image:
    """A folder that stands for the root of an image."""

    def __init__(self, root: Path, python: str) -> None:
        self.root, self.python = root, python
        self.path = f"{root}/app/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        self._environment: dict[str, str] = {}
        self._folder = root

    def here(self, text: str) -> str:
        """Absolute folders of the image as they are called on this machine."""
        return re.sub(rf"(?<![\w./])/({'|'.join(FOLDERS)})\b", rf"{self.root}/\1", text)

    def environment(self, **more: str) -> dict[str, str]:
        """What the Dockerfile says, on top of what pip needs to know of this machine."""
        kept = {k: v for k, v in os.environ.items() if re.match(r"(?i)pip_|.*_proxy$|ssl_", k)}
        home = {"HOME": str(self.root / "home"), "PATH": self.path}
        return {**kept, **home, **self._environment, **more}

    def build(self, steps: Sequence[tuple[str, str]], repository: Path) -> None:
        """As the user BUILDER."""
        for word, rest in steps:
            if word in {"ENV", "ARG"}:
                pairs = re.findall(r"(\w+)=(\S*)", rest)
                self._environment |= {k: self.here(v) for k, v in pairs if k != "PATH"}
            elif word == "WORKDIR":
                self._folder = Path(self.here(rest))
            elif word == "COPY" and not rest.startswith("--from"):
                *sources, target = rest.split()
                for source in sources:
                    self._copy(repository / source, self._folder / target)
            elif word == "RUN":
                command = re.sub(r"^python\b", self.python, self.here(rest))
                self._run(["sh", "-ec", command])

    def _copy(self, source: Path, target: Path) -> None:
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, ignore=ignored)
        else:
            target.mkdir(exist_ok=True)
            shutil.copy(source, target)
        subprocess.run(["chown", "-R", f"{BUILDER}:{BUILDER}", target], check=True)

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(
            [*as_user(BUILDER), *command],
            cwd=self._folder,
            env=self.environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-3000:]}"


def python_for_everybody() -> str:
    """A Python that another user may run, or a skip."""
    for python in (f"{sys.base_prefix}/bin/python3", "/usr/bin/python3"):
        # By a shell: setpriv itself still has root's rights when it looks for a program.
        asks = f"{python} -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))'"
        asked = ["sh", "-c", asks]
        if subprocess.run([*as_user(BUILDER), *asked], capture_output=True).returncode == 0:
            return python
    pytest.skip("no Python >= 3.11 with venv here that a user without rights may run")


@pytest.fixture(scope="module")
def image(repository: Path) -> Iterator[Image]:
    """What the target's steps install."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    if subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("namespaces of one's own are not permitted here")
    python = python_for_everybody()
    # Not below pytest's own folder, which is closed to others.
    with tempfile.TemporaryDirectory(prefix="hneurons-image-", dir="/var/tmp") as folder:
        root = Path(folder)
        root.chmod(0o755)
        for name in ("home", *FOLDERS):
            (root / name).mkdir()
            shutil.chown(root / name, BUILDER, BUILDER)
        if PIP_CONFIG.is_dir():
            shutil.copytree(PIP_CONFIG, root / "home" / ".config" / "pip")
        image = Image(root, python)
        found = stages((repository / "Dockerfile").read_text())
        for word, rest in found[TARGET]:
            if word == "COPY" and (source := re.match(r"--from=(\S+) /app /app$", rest)):
                image.build(found[source[1]], repository)
        image.build([step for step in found[TARGET] if step[0] == "ENV"], repository)
        yield image


def last(repository: Path, word: str) -> str:
    """The last such instruction of the target."""
    return [rest for name, rest in stages((repository / "Dockerfile").read_text())[TARGET]
            if name == word][-1]  # fmt: skip


def test_what_is_installed_fits_together(image: Image) -> None:
    """Packages are installed without their dependencies: a missing one shows in production."""
    done = subprocess.run(
        [f"{image.root}/app/bin/pip", "check"],
        env=image.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_the_entry_point_serves_without_network_rights_or_a_writable_root(
    image: Image, repository: Path, demo_model_path: Path, tmp_path: Path
) -> None:
    """An image that fetches, writes or becomes root at run time works where it was built only."""
    assert last(repository, "USER") == f"{SERVER}:{SERVER}"
    command = json.loads(last(repository, "ENTRYPOINT")) + json.loads(last(repository, "CMD"))
    shutil.copytree(demo_model_path.parents[1], image.root / "cache" / "hneurons" / "demo")
    volumes = [image.root / "cache", image.root / "audit"]
    subprocess.run(["chown", "-R", f"{SERVER}:{SERVER}", *volumes], check=True)
    audit = ("--audit-log", f"{image.root}/audit/audit.jsonl")
    given = (image.python, str(image.root))
    contained = ["unshare", "--net", "--mount", "sh", "-c", CONTAINED, "sh", *given]
    log = tmp_path / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*contained, *as_user(SERVER), *command, *audit],
            cwd=image.root,
            env=image.environment(OMP_NUM_THREADS="1"),
            stdout=output,
            stderr=output,
        )

    def inside(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", f"--target={process.pid}", "--net", "--mount", *as_user(SERVER)]
        return subprocess.run(
            [*enter, *words], env=image.environment(), capture_output=True, text=True, **options
        )

    try:
        health = json.loads(last(repository, "HEALTHCHECK").partition(" CMD ")[2])
        deadline = time.monotonic() + 240
        while inside(*health).returncode != 0:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "it never became healthy"
            time.sleep(0.5)
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(rf"^Uid:\s+{SERVER}\s+{SERVER}\s+{SERVER}\s+{SERVER}$", status, re.M)
        assert re.search(r"^CapEff:\s+0+$", status, re.M)
        interfaces = Path(f"/proc/{process.pid}/net/dev").read_text()
        assert re.findall(r"^\s*(\w+):", interfaces, re.M) == ["lo"]
        for folder in ("/var/tmp", f"{image.root}/app/bin", f"{image.root}/home"):
            assert inside("touch", f"{folder}/x").returncode != 0
        assert inside("touch", f"{image.root}/cache/x").returncode == 0
        body = {"model": "demo", "messages": [{"role": "user", "content": "Who wrote Hamlet?"}]}
        body |= {"max_tokens": 3, "risk": True}
        ask = ("curl", "-sS", "-H", "content-type: application/json", "-d", json.dumps(body))
        answer = inside(*ask, "http://127.0.0.1:8000/v1/chat/completions")
        assert json.loads(answer.stdout)["choices"][0]["risk"]["status"] == "scored", answer
        metrics = inside("curl", "-sS", "http://127.0.0.1:9400/metrics").stdout
        assert "hneurons_scored_tokens_total" in metrics
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert len((image.root / "audit" / "audit.jsonl").read_text().splitlines()) == 1
    finally:
        process.kill()
        process.wait()
