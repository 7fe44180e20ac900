from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path


def test_the_wheel_carries_every_committed_file_of_the_packages(
    repository: Path, tmp_path: Path
) -> None:
    """An installed server without its page, or without its probe, starts and is of no use."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=repository, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("hneurons-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    listing = subprocess.run(
        ["git", "ls-files", "probes", "server", "offline"],
        cwd=repository,
        check=True,
        capture_output=True,
        text=True,
    )
    assert set(listing.stdout.split()) <= packed
    assert {name.split("/")[0] for name in packed} == {"probes", "server", "offline"}
