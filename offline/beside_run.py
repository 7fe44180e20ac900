"""What may stand beside a run, made by tools after it: taken only when it is of this very probe."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from offline.crossvalidate import FILE, CrossValidation
from offline.records import read_record
from offline.sweep_figures import SweepFigures
from offline.transfer import Transfer
from probes.probe import Probe

log = logging.getLogger(__name__)


def published(run: Path) -> str:
    """Id of the probe that `publish` made in this run; "" where it was told another place."""
    return Probe.load(run / "probe").id if (run / "probe").exists() else ""


def sweep(path: Path, own: str) -> SweepFigures | None:
    found = SweepFigures.load(path) if path.exists() else None
    return found if found and _is_of(own, found.probe, path) else None


def transfers(folder: Path, own: str) -> Iterator[Transfer]:
    for path in sorted(folder.glob("*/transfer.json")):
        found = read_record(path, Transfer)
        if _is_of(own, found.probe, path):
            yield found


def _is_of(own: str, probe: str, path: Path) -> bool:
    if own in ("", probe):
        return True
    log.warning("%s is of %s and left out; this run's probe is %s", path, probe, own)
    return False


def crossvalidation(run: Path, fit_sha256: str) -> CrossValidation | None:
    """None, too, when it is of another fit: it need not be run for a report."""
    if not (run / FILE).exists():
        return None
    found = CrossValidation.load(run / FILE)
    if found.fit_sha256 != fit_sha256:
        log.warning("%s is of another fit and left out; `crossvalidate` again", run / FILE)
        return None
    return found
