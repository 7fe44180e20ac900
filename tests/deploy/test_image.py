"""Dockerfile, compose and their parts fit each other and the server, without a Docker engine."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import read_settings


@pytest.fixture(scope="module")
def dockerfile(repository: Path) -> str:
    return (repository / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def compose(repository: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((repository / "deploy" / "compose.yaml").read_text())
    return document


def instructions(dockerfile: str, word: str) -> list[str]:
    joined = re.sub(r"\\\n\s*", " ", dockerfile)
    return re.findall(rf"^{word} (.+)$", joined, re.MULTILINE)


def test_the_dockerfile_is_clean(repository: Path) -> None:
    """Unpinned, cached or shell-less steps are found by a linter, not by a release."""
    hadolint = Path(sys.executable).with_name("hadolint")
    linted = subprocess.run([hadolint, repository / "Dockerfile"], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


def test_what_is_copied_exists_and_is_let_through(repository: Path, dockerfile: str) -> None:
    """A file that .dockerignore holds back fails only where an image is built."""
    allowed = (repository / ".dockerignore").read_text().splitlines()
    sources = [
        source
        for line in instructions(dockerfile, "COPY")
        if not line.startswith("--from")
        for source in shlex.split(line)[:-1]
    ]
    assert len(sources) >= 9
    for source in sources:
        assert (repository / source).exists(), source
        assert f"!{source.split('/')[0]}" in allowed, source


def test_the_image_holds_what_serving_needs_and_nothing_else(repository: Path) -> None:
    """Test tools in an image are attack surface; other versions than the tested ones are worse."""

    def pins(name: str) -> set[str]:
        text = (repository / "requirements" / name).read_text()
        return set(re.findall(r"^[\w.-]+==[^\s;]+", text, re.MULTILINE))

    image = pins("image.txt")
    assert image <= pins("lock.txt")
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[<>=!]", entry)[0] for entry in project["dependencies"]} - {"torch"}
    names = {pin.partition("==")[0] for pin in image}
    assert wanted <= names
    assert names & {"pytest", "helm-python-sdk", "playwright", "scikit-learn", "mypy"} == set()


def test_the_container_starts_the_server_without_rights(
    dockerfile: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root in a container is root on the host after the next kernel bug."""
    # Root installs the compiler of the target `cuda`, and leaves again.
    assert instructions(dockerfile, "USER") == ["10001:10001", "0:0", "10001:10001"]
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    (entry,) = json.loads(instructions(dockerfile, "ENTRYPOINT")[0])
    assert entry in project["scripts"]
    for name, value in re.findall(r"(HNEURONS_HOST)=(\S+)", dockerfile):
        monkeypatch.setenv(name, value)
    settings = read_settings(json.loads(instructions(dockerfile, "CMD")[-1]))
    assert (settings.host, settings.port, settings.metrics_port) == ("0.0.0.0", 8000, 9400)
    assert "127.0.0.1:8000/livez" in instructions(dockerfile, "HEALTHCHECK")[0]
    targets = re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE)
    assert targets[-2:] == ["cuda", "cpu"]


def test_the_services_of_compose_find_each_other(
    compose: dict[str, Any], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four files name each other's ports; the fifth person to change one forgets the others."""
    services = compose["services"]
    deploy = repository / "deploy"
    monkeypatch.setenv("HNEURONS_HOST", "0.0.0.0")
    settings = read_settings(services["server"]["command"])
    scrape = yaml.safe_load((deploy / "prometheus" / "prometheus.yml").read_text())
    targets = scrape["scrape_configs"][0]["static_configs"][0]["targets"]
    assert targets == [f"server:{settings.metrics_port}"]
    assert f"server server:{settings.port} " in (deploy / "nginx" / "nginx.conf").read_text()
    source = yaml.safe_load(
        (deploy / "grafana/provisioning/datasources/prometheus.yml").read_text()
    )["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((deploy / "grafana/provisioning/dashboards/hneurons.yml").read_text())
    folder = provider["providers"][0]["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in services["grafana"]["volumes"]
    for name, service in services.items():
        for volume in service.get("volumes", ()):
            origin = volume.split(":")[0]
            assert origin in compose["volumes"] or (deploy / origin).exists(), volume
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert service["cap_drop"] == ["ALL"], name
    assert "ports" not in services["server"]


def test_image_tags_are_the_version(repository: Path, compose: dict[str, Any]) -> None:
    """A chart that pulls last month's image is an upgrade that did not happen."""
    version = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((repository / "deploy" / "helm" / "Chart.yaml").read_text())
    assert chart["appVersion"] == version
    assert compose["services"]["server"]["image"] == f"hneurons:{version}-cpu"
