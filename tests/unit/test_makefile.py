from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def makefile(repository: Path) -> str:
    return (repository / "Makefile").read_text()


def test_it_stays_a_page(makefile: str) -> None:
    """A Makefile that grows becomes a second program without tests."""
    assert len(makefile.splitlines()) < 60


def test_every_target_is_listed_and_explained(makefile: str, repository: Path) -> None:
    """`make help` is the table of contents; a target that it hides is not known to anyone."""
    listed = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[0].split()
    defined = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    assert sorted(listed) == sorted(defined)
    shown = subprocess.run(["make", "help"], cwd=repository, capture_output=True, check=True)
    assert re.findall(r"^make (\S+)", shown.stdout.decode(), re.MULTILINE) == defined


def test_every_file_and_module_that_a_target_runs_exists(makefile: str, repository: Path) -> None:
    """A target for something that is not there yet fails in front of the newcomer."""
    for script in re.findall(r"\$\(BIN\)/python (\S+\.py)", makefile):
        assert (repository / script).is_file(), script
    for module in re.findall(r"\$\(BIN\)/python -m (\w+)", makefile):
        assert (repository / module / "__main__.py").is_file(), module


@pytest.mark.parametrize("target", ["check", "fix", "test", "serve", "bench", "probe", "lock"])
def test_a_synced_environment_is_not_installed_again(
    target: str, repository: Path, tmp_path: Path
) -> None:
    """A second `make serve` must not spend minutes on pip."""
    for name in ("Makefile", "pyproject.toml", "requirements"):
        source = repository / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    stamp = tmp_path / ".venv" / "synced"
    stamp.parent.mkdir()
    stamp.touch()
    plan = ["make", "--dry-run", target]
    again = subprocess.run(plan, cwd=tmp_path, capture_output=True, check=True).stdout
    assert b"pip" not in again.replace(b"uv pip compile", b"")
    stamp.unlink()
    first = subprocess.run(plan, cwd=tmp_path, capture_output=True, check=True).stdout
    assert b"--require-hashes" in first


def test_ci_runs_what_a_newcomer_runs(repository: Path) -> None:
    """A step that only CI knows makes a green run that nobody else can repeat."""
    script = (repository / ".ci" / "run").read_text()
    steps = re.findall(r"^make .*$", script, re.MULTILINE)
    assert steps == ["make check", "make test-vllm", "make test"]
    assert script.rstrip().endswith("make test"), "pytest's summary must be the last line"
    assert "make test" in (repository / "README.md").read_text()
