"""The files of deploy/, read as what reads them in production would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture(scope="session")
def rule_files(repository: Path) -> list[Path]:
    return sorted((repository / "deploy" / "prometheus").glob("*.rules.yml"))


@pytest.fixture(scope="session")
def rules(rule_files: list[Path]) -> list[dict[str, Any]]:
    """Every recording and alert rule."""
    return list(_rules(rule_files))


def _rules(files: list[Path]) -> Iterator[dict[str, Any]]:
    for file in files:
        for group in yaml.safe_load(file.read_text())["groups"]:
            yield from group["rules"]
