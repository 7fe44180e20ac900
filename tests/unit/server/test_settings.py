"""One declaration per setting: flag over environment over file over default."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.settings import BadSettingsError, Settings, read_settings


def test_a_flag_wins_over_environment_over_file_over_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: a flag that a forgotten file overrides."""
    file = tmp_path / "s.yaml"
    file.write_text("port: 1\nmax-num-seqs: 2\nheartbeat: 3\n")
    monkeypatch.setenv("HNEURONS_PORT", "4")
    monkeypatch.setenv("HNEURONS_MAX_NUM_SEQS", "5")
    settings = read_settings(["m", "--config", str(file), "--port", "6"])
    assert (settings.port, settings.max_num_seqs, settings.heartbeat) == (6, 5, 3)
    assert settings.max_waiting_requests == 64


def test_the_environment_can_name_model_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: a container that needs a command line."""
    (tmp_path / "s.yaml").write_text("port: 1")
    monkeypatch.setenv("HNEURONS_CONFIG", str(tmp_path / "s.yaml"))
    monkeypatch.setenv("HNEURONS_MODEL", "org/name")
    settings = read_settings([])
    assert (settings.model, settings.port) == ("org/name", 1)


@pytest.mark.parametrize(
    ("flags", "environment"),
    [(["--probe", "a", "--probe", "b/c"], None), (["--probe", "a,b/c"], None), ([], "a,b/c")],
)
def test_several_probes_keep_their_order(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], environment: str | None
) -> None:
    """Prevents: another default probe than the first one."""
    if environment is not None:
        monkeypatch.setenv("HNEURONS_PROBE", environment)
    assert read_settings(["m", *flags]).probe == ("a", "b/c")


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("localhost.example.org", False),
    ],
)
def test_loopback_is_told_from_the_world(host: str, is_loopback: bool) -> None:
    """Prevents: an open playground on a public address."""
    assert Settings(model="m", host=host).is_loopback is is_loopback


def test_the_message_names_the_setting_not_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: pydantic's three lines with a URL, and a secret in the wrong variable."""
    monkeypatch.setenv("HNEURONS_PORT", "secret")
    with pytest.raises(BadSettingsError, match=r"^port: [^\n]*integer[^\n]*$") as refusal:
        read_settings(["m"])
    assert "secret" not in str(refusal.value)


def test_keys_are_no_flag() -> None:
    """Prevents: a key in the list of processes."""
    assert not [name for name in Settings.model_fields if name == "api_keys" or name == "api_key"]


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        ((), True),
        (("--no-suppression",), False),
        (("--engine", "vllm"), False),
        (("--engine", "vllm", "--suppression"), True),
    ],
)
def test_on_vllm_alpha_is_asked_for(words: tuple[str, ...], allowed: bool) -> None:
    """Prevents: every token of a production server paying for a lever that nobody moves."""
    assert read_settings(["m", *words]).allows_alpha == allowed
