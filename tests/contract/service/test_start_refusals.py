"""What cannot be served is refused at start: one sentence, the right exit code, no listener."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from probes.known_answer import build
from probes.probe import Probe
from server.__main__ import EXIT_PROBE, EXIT_REFUSED, run
from server.engines.base import ScoreRequest
from server.engines.fake import FakeEngine
from server.engines.fake_model import fake_probe

pytestmark = [
    pytest.mark.timeout(120),  # a server that starts after all would run for ever
    pytest.mark.usefixtures("restored_logging"),
]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command; the one sentence it says, after checking that it is one."""

    def attempt(*flags: str, code: int) -> str:
        arguments = list(flags)
        if "--port" not in arguments:
            arguments += ["--port", "0"]
        capsys.readouterr()
        assert run(arguments) == code
        out, err = capsys.readouterr()
        assert out == ""  # never announced
        lines = [line for line in err.splitlines() if not line.startswith("{")]
        assert len(lines) == 1, err
        assert lines[0].startswith("hneurons: ")
        assert "Traceback" not in err
        return lines[0]

    return attempt


def fitted(**model: object) -> Probe:
    """A probe with true known answers of the fake engine; `model` changes what it is bound to."""
    probe = fake_probe()
    engine = FakeEngine(probes=[probe])

    def read(token_ids: tuple[int, ...]) -> list[tuple[float, ...]]:
        order = ScoreRequest(request_id="x", token_ids=token_ids, start=0, probe=probe.card.name)
        return [reading.logits for reading in asyncio.run(engine.score(order))]

    answers = build([tuple(b"It was 1969.")], read)
    bound = msgspec.structs.replace(probe.card.model, **model)
    return made(probe, known_answers=answers, model=bound)


def made(probe: Probe, **card: object) -> Probe:
    """The same numbers under a changed card."""
    return Probe.make(
        msgspec.structs.replace(probe.card, **card),
        layer=probe.layer.numpy(),
        neuron=probe.neuron.numpy(),
        weight=probe.weight.numpy(),
        column_norm=probe.column_norm.numpy(),
        bias=probe.bias.numpy(),
        suppress=probe.suppress.numpy(),
    )


@pytest.fixture
def probe_folder(tmp_path: Path) -> Path:
    """A sound probe of the fake model."""
    fitted().save(tmp_path / "probe")
    return tmp_path / "probe"


def edit_card(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change probe.json and sign it again, as someone would who edits it on purpose."""
    file = folder / "probe.json"
    card = json.loads(file.read_bytes())["card"]
    edit(card)
    content = json.dumps(card).encode()
    digest = hashlib.sha256(content).hexdigest().encode()
    file.write_bytes(b'{"card_sha256": "%b",\n"card": %b}\n' % (digest, content))


def fake_with(folder: Path) -> tuple[str, ...]:
    return ("demo", "--engine", "fake", "--probe", str(folder))


# --- probes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("config_digest", "0" * 64),
        ("weights_fingerprint", "0" * 64),
        ("tokenizer_sha256", "0" * 64),
        ("chat_template_sha256", "0" * 64),
        ("dtype", "bfloat16"),
        ("num_layers", 5),
        ("intermediate_size", 65),
        ("hidden_size", 17),
        ("vocab_size", 260),
    ],
)
def test_a_probe_of_another_model_is_refused_by_field(
    tmp_path: Path, refused: Callable[..., str], field: str, value: object
) -> None:
    """Prevents: a fine-tune, another tokenizer or dtype, read with neurons that mean nothing."""
    fitted(**{field: value}).save(tmp_path / "other")
    sentence = refused(*fake_with(tmp_path / "other"), code=EXIT_PROBE)
    assert f"{field} is" in sentence
    assert str(value) in sentence


def test_a_probe_that_reads_otherwise_is_refused(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Prevents: R33, ready before (or without) the known-answer test."""
    probe = fitted()
    answer = probe.card.known_answers[0]
    logits = tuple((row[0] + 0.001, *row[1:]) for row in answer.logits)
    wrong = msgspec.structs.replace(answer, logits=logits)
    made(probe, known_answers=(wrong,)).save(tmp_path / "wrong")
    assert "known answer" in refused(*fake_with(tmp_path / "wrong"), code=EXIT_PROBE)


def test_an_unknown_field_is_refused(probe_folder: Path, refused: Callable[..., str]) -> None:
    """Prevents: a misspelt threshold that is silently ignored."""
    edit_card(probe_folder, lambda card: card.update(treshold=0.5))
    assert "treshold" in refused(*fake_with(probe_folder), code=EXIT_PROBE)


def test_an_edited_card_is_refused(probe_folder: Path, refused: Callable[..., str]) -> None:
    """Prevents: a threshold that rotted on a disk, or was changed by hand."""
    file = probe_folder / "probe.json"
    file.write_bytes(file.read_bytes().replace(b'"recall": 0.8', b'"recall": 0.9'))
    assert "damaged or was edited" in refused(*fake_with(probe_folder), code=EXIT_PROBE)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_no_numbers_are_refused(
    probe_folder: Path, refused: Callable[..., str], number: float
) -> None:
    """Prevents: NaN weights, which make every risk NaN and load without a word."""
    import safetensors.torch

    file = probe_folder / "probe.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    tensors["weight"][1, 0] = number
    content = safetensors.torch.save(tensors)
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit_card(probe_folder, lambda card: card.update(tensors_sha256=digest))
    assert "weight must be finite" in refused(*fake_with(probe_folder), code=EXIT_PROBE)


@pytest.mark.parametrize("offset", [8, 100, -1])
def test_a_flipped_bit_is_refused(
    probe_folder: Path, refused: Callable[..., str], offset: int
) -> None:
    """Prevents: F11, bit flips, which safetensors does not notice."""
    file = probe_folder / "probe.safetensors"
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)
    assert "damaged" in refused(*fake_with(probe_folder), code=EXIT_PROBE)


def test_a_truncated_file_is_refused(probe_folder: Path, refused: Callable[..., str]) -> None:
    """Prevents: a copy that was interrupted."""
    for name in ("probe.safetensors", "probe.json"):
        content = (probe_folder / name).read_bytes()
        (probe_folder / name).write_bytes(content[: len(content) // 2])
        refused(*fake_with(probe_folder), code=EXIT_PROBE)


class _Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("name", ["probe.pkl", "probe.joblib", "probe.pt", "probe", "probe.json"])
def test_a_pickle_is_refused_and_never_run(
    tmp_path: Path, refused: Callable[..., str], name: str
) -> None:
    """Prevents: R13, code that runs when a probe is loaded; by content as well as by name."""
    content = pickle.dumps(_Bomb(tmp_path / "ran"))
    alone = tmp_path / "alone" / name
    alone.parent.mkdir()
    alone.write_bytes(content)
    refused(*fake_with(alone), code=EXIT_PROBE)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "probe.json").write_bytes(content)
    refused(*fake_with(folder), code=EXIT_PROBE)
    assert not (tmp_path / "ran").exists()


def test_a_probe_that_is_not_there_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    """Prevents: a typo that starts a server without its monitor."""
    assert "nope" in refused("demo", "--engine", "fake", "--probe", "nope", code=EXIT_REFUSED)
    absent = str(tmp_path / "absent")
    assert "absent" in refused("demo", "--engine", "fake", "--probe", absent, code=EXIT_REFUSED)
    (tmp_path / "empty").mkdir()
    refused("demo", "--engine", "fake", "--probe", str(tmp_path / "empty"), code=EXIT_PROBE)


def test_a_probe_is_matched_to_real_weights(
    tmp_path: Path, refused: Callable[..., str], tiny_model: Path
) -> None:
    """Prevents: Done-when 7 holding for the fake engine only."""
    fitted().save(tmp_path / "probe")
    sentence = refused(str(tiny_model), "--probe", str(tmp_path / "probe"), code=EXIT_PROBE)
    assert "does not belong to this model" in sentence


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A random llama with the fake engine's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from server.engines.fake_model import VOCAB_SIZE, fake_tokenizer

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=258,
    )
    folder = tmp_path / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    fake_tokenizer().save_pretrained(folder)
    return folder


# --- settings, models, addresses --------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ((), "MODEL"),
        (("demo", "--port", "70000"), "port"),
        (("demo", "--port", "-1"), "port"),
        (("demo", "--max-num-seqs", "0"), "max_num_seqs"),
        (("demo", "--drain-timeout", "nan"), "drain_timeout"),
        (("demo", "--heartbeat", "0"), "heartbeat"),
        (("demo", "--revision", "main"), "revision"),
        (("demo", "--root-path", "x"), "root_path"),
        (("demo", "--ssl-keyfile", "k.pem"), "ssl_certfile"),
        (("demo", "--probe", "none", "--probe", "x"), "none"),
        (("demo", "--config", "absent.yaml"), "absent.yaml"),
        (("demo", "--api-key-file", "absent"), "absent"),
        (("demo", "--served-model-name", "a b"), "served_model_name"),
        (("demo", "--engine", "fake", "--probe", "none", "--risk-by-default"), "risk_by_default"),
        (("./absent",), "absent"),
        (("/absent/model",), "/absent/model"),
        (("a/b/c",), "a/b/c"),
        (("no-such-org/no-such-model",), "no-such-org/no-such-model"),
        (("demo", "--engine", "fake", "--host", "256.1.1.1"), "256.1.1.1"),
        (("demo", "--engine", "fake", "--host", "192.0.2.1"), "192.0.2.1"),
    ],
)
def test_a_bad_setting_is_refused_by_name(
    refused: Callable[..., str], flags: tuple[str, ...], word: str
) -> None:
    """Prevents: a traceback, or a default in place of what was asked for."""
    assert word in refused(*flags, code=EXIT_REFUSED)


@pytest.mark.parametrize(
    "flags", [("demo", "--nope"), ("demo", "extra"), ("demo", "--engine", "x")]
)
def test_wrong_usage_is_refused(flags: tuple[str, ...]) -> None:
    """Prevents: a misspelt flag that is ignored."""
    with pytest.raises(SystemExit) as ended:
        sys.exit(run([*flags, "--port", "0"]))
    assert ended.value.code in (EXIT_REFUSED, 2)


@pytest.mark.parametrize(
    "content",
    [
        "nope: 1",
        "- a",
        "a: [",
        "metrics_port: many",
        "\tport: 1",
        "api_keys: sk-secret",
        "1: 2",
        "\xff\x00",
    ],
)
def test_a_bad_config_file_is_refused(
    tmp_path: Path, refused: Callable[..., str], content: str
) -> None:
    """Prevents: a misspelt or misplaced setting in a file, and a key that is kept in one."""
    file = tmp_path / "settings.yaml"
    file.write_bytes(content.encode("latin-1"))
    sentence = refused("demo", "--engine", "fake", "--config", str(file), code=EXIT_REFUSED)
    assert "sk-secret" not in sentence


@pytest.mark.parametrize("keys", ["", " ", ",", "sk-secret,"])
def test_empty_keys_are_refused(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str], keys: str
) -> None:
    """Prevents: a secret that failed to resolve and leaves the server open."""
    monkeypatch.setenv("HNEURONS_API_KEYS", keys)
    assert "sk-secret" not in refused("demo", "--engine", "fake", code=EXIT_REFUSED)


def test_a_taken_port_is_refused(refused: Callable[..., str]) -> None:
    """Prevents: minutes of loading before the sentence, or two servers that share a port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for flag in ("--port", "--metrics-port"):
            sentence = refused("demo", "--engine", "fake", flag, port, code=EXIT_REFUSED)
            assert port in sentence
            assert "in use" in sentence


def test_a_bad_certificate_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    """Prevents: plain HTTP where TLS was asked for."""
    for name in ("key.pem", "cert.pem"):
        (tmp_path / name).write_text("not PEM")
    tls = ("--ssl-keyfile", str(tmp_path / "key.pem"), "--ssl-certfile", str(tmp_path / "cert.pem"))
    assert "ssl" in refused("demo", "--engine", "fake", *tls, code=EXIT_REFUSED)
    assert "ssl" in refused(
        "demo", "--engine", "fake", *tls[:3], str(tmp_path / "absent"), code=EXIT_REFUSED
    )


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    """Prevents: a traceback of a library for an empty or a wrong folder."""
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty" in refused(str(empty), code=EXIT_REFUSED)
    (empty / "config.json").write_text("{")
    refused(str(empty), code=EXIT_REFUSED)
    (empty / "config.json").write_text('{"model_type": "llama"}')
    refused(str(empty), code=EXIT_REFUSED)


def test_the_process_exits_with_the_code(tmp_path: Path) -> None:
    """Prevents: `run` that returns 3 and a process that exits with 0."""
    (tmp_path / "probe.pkl").write_bytes(pickle.dumps([1]))
    flags = ["demo", "--engine", "fake", "--probe", str(tmp_path / "probe.pkl"), "--port", "0"]
    command = [sys.executable, "-m", "server", *flags]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert finished.returncode == EXIT_PROBE
    assert finished.stdout == ""
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_asking_about_the_program_is_quick_and_clean(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents: `--help` that needs a model, or names a flag for keys."""
    with pytest.raises(SystemExit) as ended:
        sys.exit(run([flag]))
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out
    assert "--api-keys" not in out
