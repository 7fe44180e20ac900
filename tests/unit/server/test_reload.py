"""A reload that fails, for whatever reason, leaves the probes that are served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from probes.errors import ProbeError
from probes.probe import Probe
from server import reload
from server.engines.fake import FakeEngine, fake_probe


class Reloading(FakeEngine):
    """What of a reload reached the engine."""

    told: list[str]

    async def attach(self, probes: Sequence[Probe]) -> None:
        self.told = ["attach"]

    def offer(self, probes: Sequence[Probe]) -> None:
        self.told.append("offer")

    async def detach(self) -> None:
        self.told.append("detach")


@pytest.mark.parametrize("error", [ProbeError("does not fit"), RuntimeError("out of memory")])
async def test_what_fails_is_undone_and_counted(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only what a probe is refused for: a meter that finds no memory ended in silence."""
    probe = fake_probe()
    probe.save(tmp_path / "probe", readme="")
    engine, counted = Reloading(probes=[probe]), []

    async def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(reload, "check_probes", fails)
    metrics = SimpleNamespace(probes_reloaded=counted.append)
    service: Any = SimpleNamespace(engine=engine, metrics=metrics, suppression=True)
    await reload.Reload(
        service, find=lambda: [tmp_path / "probe"], open_now=lambda: frozenset()
    ).run()
    assert counted == ["rejected"]
    assert engine.told == ["attach", "detach"]
