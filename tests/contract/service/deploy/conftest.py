"""Debian's Prometheus beside a real server, and traffic between them."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml

PATIENCE = 60.0  # for what takes seconds on an idle machine
FASTER = 200  # five minutes of a rule pass in a second and a half
_UNITS = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if value := condition():
                return value
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.1)


def faster(text: str) -> str:
    """PromQL or a duration, in fast motion."""
    return re.sub(
        r"\b(\d+)([smhd])\b",
        lambda m: f"{max(int(m[1]) * _UNITS[m[2]] // FASTER, 500)}ms",
        text,
    )


def write_fast_rules(files: list[Path], folder: Path) -> None:
    """The rules with every duration FASTER times shorter; nothing else differs."""
    for file in files:
        content = yaml.safe_load(file.read_text())
        for group in content["groups"]:
            group["interval"] = "250ms"
            for rule in group["rules"]:
                rule["expr"] = faster(rule["expr"])
                if "for" in rule:
                    rule["for"] = faster(rule["for"])
        (folder / file.name).write_text(yaml.safe_dump(content))


class Prometheus:
    """A running Prometheus and its query API."""

    def __init__(self, address: str) -> None:
        self._client = httpx.Client(base_url=address, timeout=20)

    def get(self, path: str, **parameters: Any) -> Any:
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def is_ready(self) -> bool:
        return self._client.get("/-/ready").is_success

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Samples of an instant query."""
        samples: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return samples

    def firing(self) -> set[str]:
        alerts = self.get("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def close(self) -> None:
        self._client.close()


@pytest.fixture(scope="session")
def start_prometheus(
    repository: Path,
) -> Callable[..., AbstractContextManager[Prometheus]]:
    """`with start_prometheus(folder, ports) as prometheus`: our rules in fast motion."""

    @contextmanager
    def start(folder: Path, ports: list[int]) -> Iterator[Prometheus]:
        rules = sorted((repository / "deploy" / "prometheus").glob("*.rules.yml"))
        write_fast_rules(rules, folder)
        config = {
            "global": {"scrape_interval": "250ms", "scrape_timeout": "250ms"},
            "rule_files": [str(folder / rule.name) for rule in rules],
            "scrape_configs": [
                {
                    "job_name": "hneurons",
                    "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}],
                }
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        with (folder / "prometheus.log").open("w") as log:
            process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'tsdb'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                    "--query.lookback-delta=2s",
                ],
                stdout=log,
                stderr=log,
            )
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        try:
            wait_for(prometheus.is_ready, "Prometheus is ready")
            wait_for(lambda: prometheus.query("up == 1"), "the first scrape")
            yield prometheus
        finally:
            prometheus.close()
            process.terminate()
            process.wait(20)

    return start


class Proxy:
    """A running nginx with the shipped configuration; only addresses and folders differ."""

    def __init__(self, port: int, log: Path) -> None:
        self.port, self.log = port, log
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def raw(self, data: bytes) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=40)
        sock.sendall(data)
        return sock

    def rest_of(self, sock: socket.socket) -> bytes:
        """Everything until the proxy closes."""
        parts = []
        with sock, contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while part := sock.recv(65_536):
                parts.append(part)
        return b"".join(parts)


@pytest.fixture(scope="session")
def start_nginx(repository: Path) -> Callable[..., AbstractContextManager[Proxy]]:
    """`with start_nginx(folder, ports) as proxy`: in front of servers on these ports."""

    @contextmanager
    def start(folder: Path, ports: list[int]) -> Iterator[Proxy]:
        text = (repository / "deploy" / "nginx" / "nginx.conf").read_text()
        port, log = free_port(), folder / "nginx.log"
        replicas = " ".join(f"server 127.0.0.1:{p} max_fails=3 fail_timeout=5s;" for p in ports)
        for shipped, here in (
            ("server server:8000 max_fails=3 fail_timeout=5s;", replicas),
            ("listen 8080;", f"listen 127.0.0.1:{port};"),
            ("/run/nginx/", f"{folder}/"),
            ("/dev/stdout", str(log)),
            ("worker_processes auto;", "worker_processes 1; user root;"),
        ):
            assert shipped in text
            text = text.replace(shipped, here)
        (folder / "nginx.conf").write_text(text)
        with (folder / "nginx.err").open("w") as errors:
            process = subprocess.Popen(
                ["nginx", "-c", str(folder / "nginx.conf"), "-g", "daemon off;"],
                stdout=errors,
                stderr=errors,
            )
        proxy = Proxy(port, log)
        try:
            wait_for(lambda: proxy.client.get("/livez"), (folder / "nginx.err").read_text())
            yield proxy
        finally:
            proxy.client.close()
            process.terminate()
            process.wait(20)

    return start


class Traffic:
    """Chats, one after the other, on a thread; `content` can be changed while it runs."""

    def __init__(self, port: int, content: str, *, risk: Any = True) -> None:
        self.content, self.risk = content, risk
        self.statuses: list[int] = []
        self._url = f"http://127.0.0.1:{port}/v1/chat/completions"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self._stop.is_set():
                message = {"role": "user", "content": self.content}
                body = {"model": "m", "messages": [message], "max_tokens": 60}
                body["risk"] = self.risk
                try:
                    self.statuses.append(client.post(self._url, json=body).status_code)
                except httpx.TransportError:
                    self.statuses.append(0)
                self._stop.wait(0.02)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """The helpers above, for test modules (a conftest cannot be imported)."""
    return SimpleNamespace(Traffic=Traffic, wait_for=wait_for, faster=faster, free_port=free_port)
