"""A probe goes to a hub and comes back: pushed by `offline`, fetched by commit by `server`.

The hub is a stand-in on this machine that speaks the endpoints which huggingface_hub uses. The
client runs in processes of its own, since it reads its switches (HF_ENDPOINT) when it is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import msgspec
import pytest
import yaml

from offline.hub import front_matter
from probes.probe import Probe
from server.engines.fake_model import fake_probe

REPOSITORY = "someone/a-probe"


class Hub(ThreadingHTTPServer):
    """Repositories by id, each a list of commits; `requests` are `METHOD path` as they came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.cards: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, content: object, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        self.server.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer secret":
            return self.json({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            self.server.commits.setdefault(f"{wanted['organization']}/{wanted['name']}", {})
            return self.json({"url": f"{self.server.url}/{REPOSITORY}", "id": REPOSITORY})
        if self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            return self.json({"errors": [], "warnings": []})
        if self.path == f"/api/models/{REPOSITORY}/preupload/main":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.json({"files": files})
        if self.path.startswith(f"/api/models/{REPOSITORY}/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commits = self.server.commits[REPOSITORY]
            commit = hashlib.sha1(body).hexdigest()
            commits[commit] = {**(list(commits.values())[-1] if commits else {}), **files}
            return self.json(
                {
                    "commitUrl": f"{self.server.url}/{REPOSITORY}/commit/{commit}",
                    "commitOid": commit,
                    "success": True,
                }
            )
        return self.json({"error": "unknown"}, 404)

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        for commit, files in self.server.commits.get(REPOSITORY, {}).items():
            if self.path.split("?")[0] == f"/api/models/{REPOSITORY}/revision/{commit}":
                siblings = [{"rfilename": name} for name in files]
                return self.json({"id": REPOSITORY, "sha": commit, "siblings": siblings})
            if self.path.startswith(f"/api/models/{REPOSITORY}/tree/{commit}"):
                return self.json(
                    [
                        {
                            "type": "file",
                            "path": name,
                            "size": len(body),
                            "oid": hashlib.sha1(body).hexdigest(),
                        }
                        for name, body in files.items()
                    ]
                )
            for name, body in files.items():
                if self.path == f"/{REPOSITORY}/resolve/{commit}/{name}":
                    etag = f'"{hashlib.sha1(body).hexdigest()}"'
                    return self.answer(200, body, ETag=etag, X_Repo_Commit=commit)
        return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A probe on disk, with its page."""
    probe = fake_probe()
    named = {"base_model": "org/fake", "datasets": "org/questions"}
    card = msgspec.structs.replace(probe.card, training=named)
    probe.save(tmp_path / "mine", readme=front_matter(card) + "# A probe\n")
    return tmp_path / "mine"


def run(hub: Hub, home: Path, *command: str, offline: bool = False) -> str:
    """Last line of stdout, or of stderr when the command fails."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "secret",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        },
    )
    return (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1]


FETCH = "import sys; from server.hub import fetch_probe; print(fetch_probe(sys.argv[1]))"


def test_a_probe_comes_back_from_the_hub_byte_for_byte(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    """What `push` prints is what `--probe` takes; the second time nothing is asked of the hub, so a
    server restarts without it."""
    pinned = run(hub, tmp_path / "a", "-m", "offline", "push", str(folder), REPOSITORY)
    assert pinned.startswith(f"{REPOSITORY}@")
    home = tmp_path / "b"
    fetched = Path(run(hub, home, "-c", FETCH, pinned))
    assert fetched.is_dir(), fetched
    for file in folder.iterdir():
        assert (fetched / file.name).read_bytes() == file.read_bytes()
    assert Probe.load(fetched).sha256 == Probe.load(folder).sha256
    asked = len(hub.requests)
    assert Path(run(hub, home, "-c", FETCH, pinned, offline=True)) == fetched
    assert len(hub.requests) == asked


def test_a_commit_stays_what_it_was(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """The reason for pinning: whoever can push cannot change what a server loads."""
    before = run(hub, tmp_path, "-m", "offline", "push", str(folder), REPOSITORY)
    other = fake_probe("other")
    shutil.rmtree(folder)
    other.save(folder, readme="---\nlicense: mit\n---\n")
    after = run(hub, tmp_path, "-m", "offline", "push", str(folder), REPOSITORY)
    assert after != before
    assert Probe.load(Path(run(hub, tmp_path, "-c", FETCH, before))).card.name == "fake"
    assert Probe.load(Path(run(hub, tmp_path, "-c", FETCH, after))).card.name == "other"


def test_what_the_hub_does_not_have_is_one_sentence(hub: Hub, folder: Path, tmp_path: Path) -> None:
    missing = f"{REPOSITORY}@{'0' * 40}"
    server = run(hub, tmp_path, "-m", "server", "demo", "--engine", "fake", "--probe", missing)
    assert f"cannot fetch probe '{missing}'" in server
    unpinned = run(hub, tmp_path, "-m", "server", "demo", "--engine", "fake", "--probe", REPOSITORY)
    assert "org/name@40 hex digits" in unpinned
    assert not any(REPOSITORY in request for request in hub.requests if "0000" not in request)
    refused = run(hub, tmp_path, "-m", "offline", "push", str(folder), "no such name/at all/x")
    assert refused.startswith("error: the hub did not take")


def test_the_page_opens_with_what_the_hub_files_a_probe_by(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    """Without base_model the probe is not listed under its model; bad YAML is refused on upload."""
    run(hub, tmp_path, "-m", "offline", "push", str(folder), REPOSITORY)
    (page,) = set(hub.cards)
    _, block, rest = page.split("---\n", 2)
    data = yaml.safe_load(block)
    assert data["base_model"] == "org/fake"
    assert data["datasets"] == ["org/questions"]
    assert data["library_name"] == "hneurons"
    assert {"hallucination-detection", "h-neurons"} <= set(data["tags"])
    assert "roc_auc" in data["metrics"]
    assert rest.strip() == "# A probe"


def test_what_is_no_name_of_the_hub_becomes_no_link() -> None:
    """The stem of a file and the name of a folder would point at whatever is called so there."""
    card = fake_probe().card
    card = msgspec.structs.replace(card, training={"sources": "movies, ordinary_prompts"})
    data = yaml.safe_load(front_matter(card).split("---\n")[1])
    assert not {"base_model", "datasets"} & set(data)
