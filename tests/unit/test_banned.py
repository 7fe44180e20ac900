"""What must not stand in the packages: ways to run what is loaded, and traces of one machine."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load"}
CALLS |= {"os.system", "os.popen", "numpy.load", "np.load"}
KEYWORDS = {"shell": True, "verify": False, "trust_remote_code": True, "allow_pickle": True}
TRACES = {
    "a path of one machine": re.compile(r"(?<![\w.~}])/(?:home|root|Users|work|opt|tmp)/[\w.-]+"),
    "a registry or hub host": re.compile(
        r"pypi\.org|pythonhosted\.org|registry\.npmjs|deb\.debian\.org|huggingface\.co"
    ),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
}


def findings(source: str) -> Iterator[str]:
    """Each banned construct in Python source, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [module or ""] if module else [alias.name for alias in node.names]
            for name in names:
                if name.split(".")[0] in MODULES:
                    yield f"{node.lineno}: import {name}"
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in CALLS:
                yield f"{node.lineno}: {ast.unparse(node.func)}()"
            for keyword in node.keywords:
                banned = KEYWORDS.get(keyword.arg or "")
                value = keyword.value
                if banned is not None and isinstance(value, ast.Constant) and value.value is banned:
                    yield f"{node.lineno}: {keyword.arg}={banned}"


@pytest.mark.parametrize("package", ["probes", "server", "offline"])
def test_no_way_to_run_what_is_loaded(package: str, repository: Path) -> None:
    """A probe or a request that is executed is the end of every other promise (R38)."""
    found = [
        f"{file.relative_to(repository)}:{finding}"
        for file in (repository / package).rglob("*.py")
        for finding in findings(file.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "yaml.load(text)",
        "eval(text)",
        "subprocess.run(command, shell=True)",
        "httpx.get(url, verify=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_search_finds_what_it_is_for(line: str) -> None:
    """A search that finds nothing because it is broken looks like a clean repository."""
    assert list(findings(line))


def test_no_trace_of_a_machine_or_registry_in_any_committed_file(repository: Path) -> None:
    """Such a line works for one person, and tells the world where that person works."""
    listing = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, check=True)
    files = listing.stdout.decode().splitlines()
    assert len(files) > 50
    found = []
    for name in files:
        path = repository / name
        if name == "tests/unit/test_banned.py" or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture, a tensor file
        found += [f"{name}: {what} {m[0]}" for what, p in TRACES.items() for m in p.finditer(text)]
    assert found == []
