"""README.md and docs/: their examples run, their links lead somewhere, the tree is the tree."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from tests.running import running_server

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
RUNNABLE = [ROOT / "README.md", ROOT / "docs" / "api.md"]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def curls(path: Path) -> list[str]:
    """Each curl command of the console blocks, with the lines that its quotes join."""
    text = "\n".join(blocks(path, "console"))
    return re.findall(r"^curl (?:[^'\n]|'[^']*')*", text, re.MULTILINE)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A fake engine behind the real command, under the name that the documents use."""
    folder = tmp_path_factory.mktemp("server")
    with running_server(folder, "demo", "--engine", "fake") as server:
        yield f"127.0.0.1:{server.port}"


@pytest.mark.parametrize("path", RUNNABLE, ids=relative)
def test_every_curl_example_is_answered(path: Path, address: str) -> None:
    """The first thing a reader does is paste; a 400 is the end of the visit."""
    commands = curls(path)
    assert commands
    for command in commands:
        command = command.replace("127.0.0.1:8000", address).replace("curl -s", "curl -sS --fail")
        run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert run.returncode == 0, f"{command}\n{run.stderr}"
        assert run.stdout.startswith("{")


@pytest.mark.parametrize("path", RUNNABLE, ids=relative)
def test_every_python_example_runs(path: Path, address: str) -> None:
    """Written once, true until somebody renames a field."""
    examples = blocks(path, "python")
    assert examples
    for code in examples:
        run = subprocess.run(
            [sys.executable, "-c", code.replace("127.0.0.1:8000", address)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "NO_PROXY": "127.0.0.1"},
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip()


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_every_link_leads_to_a_file(path: Path) -> None:
    """A dead link in a security page says more than the page."""
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", path.read_text())
    dead = [target for target in targets if not (path.parent / target).exists()]
    assert dead == []


def test_every_decision_is_in_the_list() -> None:
    """A decision that nobody finds is taken again, differently."""
    folder = ROOT / "docs" / "decisions"
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (folder / "README.md").read_text()))
    assert listed == {path.name for path in folder.glob("*.md")} - {"README.md"}


def test_tree_and_figures_of_the_readme_are_those_of_the_repository() -> None:
    """A map that lacks a file, or a figure of last month's probe: `make fix` writes both anew."""
    specification = spec_from_file_location("readme", ROOT / "docs" / "readme.py")
    assert specification is not None
    assert specification.loader is not None
    readme = module_from_spec(specification)
    specification.loader.exec_module(readme)
    text = (ROOT / "README.md").read_text()
    assert readme.render(text) == text
    assert "cett.py " in text
    assert "the probe |" in text


def test_every_name_of_the_architecture_exists() -> None:
    """A walk through the code that names what was renamed leads into a wall."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    names = set(re.findall(r"`((?:probes|server|offline)\.[\w.]+)`", text))
    assert len(names) > 30
    for name in sorted(names):
        pkgutil.resolve_name(name)
