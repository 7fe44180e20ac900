"""The lock holds what pyproject asks for, by hash, and names no machine and no registry."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def lock(repository: Path) -> str:
    return (repository / "requirements" / "lock.txt").read_text()


@pytest.fixture(scope="module")
def pinned(lock: str, repository: Path) -> dict[str, list[str]]:
    """Versions by package; several where the lock forks by Python version."""
    torch = (repository / "requirements" / "torch.txt").read_text()
    versions: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", lock + torch, re.MULTILINE):
        versions.setdefault(canonicalize_name(name), []).append(version)
    return versions


def test_lock_agrees_with_pyproject(pinned: dict[str, list[str]], repository: Path) -> None:
    """A dependency added without `make lock` works only on the machine of who added it."""
    pyproject = tomllib.loads((repository / "pyproject.toml").read_text())
    project = pyproject["project"]
    wanted = [*project["dependencies"], *pyproject["build-system"]["requires"]]
    wanted += [entry for extra in project["optional-dependencies"].values() for entry in extra]
    for requirement in map(Requirement, wanted):
        versions = pinned.get(canonicalize_name(requirement.name), [])
        assert versions, f"{requirement} is not in requirements/lock.txt: make lock"
        assert all(map(requirement.specifier.contains, versions)), f"{requirement}: {versions}"


def test_every_pin_has_a_hash(lock: str) -> None:
    """One line without a hash, and `pip --require-hashes` refuses the whole file."""
    blocks = re.split(r"^(?=[\w.-]+==)", lock, flags=re.MULTILINE)[1:]
    assert len(blocks) > 80
    assert [block for block in blocks if "--hash=sha256:" not in block] == []


def test_torch_is_left_to_its_own_line(lock: str) -> None:
    """Its builds differ per machine: a locked CUDA build would be gigabytes on a laptop."""
    assert re.findall(r"^(torch|triton|nvidia-\S+|cuda-\S+)==", lock, re.MULTILINE) == []


def test_lock_names_no_machine_and_no_registry(lock: str) -> None:
    """The file must install from whatever index its reader has."""
    assert re.findall(r"https?://|--index-url|--find-links|(?<!\w)/(?:home|root|tmp)/", lock) == []


def test_build_requirements_are_the_locked_ones(repository: Path) -> None:
    """The package is built without isolation, so what builds it must come from the lock too."""
    pyproject = tomllib.loads((repository / "pyproject.toml").read_text())
    lines = (repository / "requirements" / "build.in").read_text().splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    assert listed == pyproject["build-system"]["requires"]
