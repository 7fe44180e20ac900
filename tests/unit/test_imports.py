"""The arrows between the packages, and what an import may cost."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGES = ("probes", "server", "offline")


def imported_names(file: Path) -> set[str]:
    """Top-level names that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def loaded_by(module: str) -> set[str]:
    """Modules in memory after `import module` in a fresh interpreter."""
    code = f"import {module}, json, sys; print(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout))


@pytest.mark.parametrize("package", PACKAGES)
def test_package_resolves_inside_the_repository(package: str, repository: Path) -> None:
    """`server` is a common name: a foreign one would be imported instead, and half of it work."""
    origin = Path(import_module(package).__file__ or "").resolve()
    assert origin == repository / package / "__init__.py"


@pytest.mark.parametrize(("importer", "imported"), [("server", "offline"), ("offline", "server")])
def test_server_and_offline_never_import_each_other(
    importer: str, imported: str, repository: Path
) -> None:
    """A probe must be trained on what a server writes over HTTP, not on its insides."""
    guilty = [
        file for file in (repository / importer).rglob("*.py") if imported in imported_names(file)
    ]
    assert guilty == []


@pytest.mark.parametrize("module", ["server.__main__", "server.app", "server.engines.fake"])
def test_the_server_starts_without_other_engines_and_without_training(module: str) -> None:
    """A server without vllm or scikit-learn installed must start; a fake one within a second."""
    heavy = {"vllm", "sklearn", "skglm", "scipy", "offline", "matplotlib"}
    assert loaded_by(module) & heavy == set()


def test_every_import_is_a_declared_dependency(repository: Path) -> None:
    """What another package happens to bring today may be gone with its next release."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]

    def declared(*lists: list[str]) -> set[str]:
        found = (re.match(r"[\w-]+", entry) for entries in lists for entry in entries)
        return {match[0].lower().replace("_", "-") for match in found if match}

    extras = project["optional-dependencies"]
    allowed = {
        "probes": declared(project["dependencies"]),
        "server": declared(project["dependencies"], extras["otel"]),
        "offline": declared(project["dependencies"], extras["offline"]),
        "tests": declared(project["dependencies"], *extras.values()),
    }
    # vLLM lives in an environment of its own; one folder and its tests may import it.
    vllm = declared((repository / "requirements" / "vllm-gpu.txt").read_text().splitlines())
    distributions = packages_distributions()
    local = {*PACKAGES, "tests", "benchmarks"}
    undeclared = {
        f"{file.relative_to(repository)}: {name}"
        for folder, names in allowed.items()
        for file in (repository / folder).rglob("*.py")
        for name in imported_names(file) - sys.stdlib_module_names - local
        if not {d.lower().replace("_", "-") for d in distributions.get(name, [name])}
        & (names | (vllm if "vllm" in file.parts else set()))
    }
    assert undeclared == set()
