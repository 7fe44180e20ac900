from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path


def test_newest_entry_is_the_version_of_the_package(repository: Path) -> None:
    """A release without a changelog entry tells nobody what changed."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    changelog = (repository / "CHANGELOG.md").read_text()
    entries = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    assert entries[0] == project["version"] == version("hneurons")


def test_every_dependency_has_its_reason(repository: Path) -> None:
    """A dependency that nobody can explain is one that nobody dares to remove."""
    pyproject = tomllib.loads((repository / "pyproject.toml").read_text())
    project = pyproject["project"]
    entries = [*project["dependencies"], *pyproject["build-system"]["requires"]]
    entries += [entry for extra in project["optional-dependencies"].values() for entry in extra]
    declared = {match[0] for entry in entries if (match := re.match(r"[\w-]+", entry))}

    table = (repository / "CHANGELOG.md").read_text().partition("| package | why |")[2]
    rows = re.findall(r"^\| ([\w, -]+) \| \S.+ \|$", table, re.MULTILINE)
    explained = {name for row in rows for name in row.split(", ")}
    assert explained == declared
