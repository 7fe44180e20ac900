"""What MODEL, --probe and the keys mean."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import msgspec
import pytest

from probes.card import KnownAnswer
from probes.errors import KnownAnswerError, ModelError
from probes.known_answer import build
from probes.probe import Probe
from server import startup
from server.engines.base import (
    EngineDeadError,
    GenerationRequest,
    Reading,
    ScoreRequest,
    Step,
)
from server.engines.fake import FakeEngine
from server.engines.fake_model import fake_probe
from server.known_answer import check_probes
from server.settings import BadSettingsError, Settings
from server.startup import find_key_hashes, find_model, find_probes, load_engine, make_service


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped probes with the demo's and another one."""
    for name in (startup.DEMO_PROBE, "other"):
        (tmp_path / "fitted" / name).mkdir(parents=True)
    monkeypatch.setattr(startup, "SHIPPED_PROBES", tmp_path / "fitted")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "fitted"


def test_the_demo_has_its_probe_and_others_have_none(shipped: Path) -> None:
    """Prevents: a probe of one model that is tried on every model, or a demo without risk."""
    assert find_probes(Settings(model="demo")) == (shipped / startup.DEMO_PROBE,)
    assert find_probes(Settings(model="org/name")) == ()
    assert find_probes(Settings(model="demo", probe=("none",))) == ()
    assert find_probes(Settings(model="demo", engine="fake")) == ()


def test_a_probe_is_a_shipped_name_or_a_folder(shipped: Path, tmp_path: Path) -> None:
    """Prevents: a folder in the working directory that shadows a shipped probe unseen."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "other").mkdir()
    words = ("other", "mine", "./other", str(tmp_path / "mine"))
    assert find_probes(Settings(model="m", probe=words)) == (
        shipped / "other",
        Path("mine"),
        Path("other"),
        tmp_path / "mine",
    )
    with pytest.raises(BadSettingsError, match="other, smollm2"):
        find_probes(Settings(model="m", probe=("absent",)))


def test_a_model_is_called_by_its_folder_or_id(tmp_path: Path) -> None:
    """Prevents: a path of the operator's disk in every answer."""
    folder = tmp_path / "My-Model"
    folder.mkdir()
    assert find_model(Settings(model=str(folder))).names == ("My-Model",)
    assert find_model(Settings(model="org/name")).names == ("org/name",)
    assert find_model(Settings(model="org/name", served_model_name="x")).names == ("x",)


def test_keys_come_from_environment_and_file_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: one source that silently replaces the other."""
    monkeypatch.setenv("HNEURONS_API_KEYS", "a")
    digest = hashlib.sha256(b"b").hexdigest()
    (tmp_path / "keys").write_text(digest)
    hashes = find_key_hashes(Settings(model="m", api_key_file=tmp_path / "keys"))
    assert hashes == (hashlib.sha256(b"a").digest(), bytes.fromhex(digest))
    monkeypatch.delenv("HNEURONS_API_KEYS")
    assert find_key_hashes(Settings(model="m")) == ()


def test_risk_by_default_needs_a_probe() -> None:
    """Prevents: a server that promises a risk and never gives one."""
    engine = FakeEngine(probes=[])
    model = startup.Model("m", ("m",))
    service = make_service(Settings(model="m"), engine, model)
    assert service.default_probe is None
    with pytest.raises(BadSettingsError, match="risk_by_default"):
        make_service(Settings(model="m", risk_by_default=True), engine, model)


def test_a_damaged_checkpoint_is_a_sentence(tmp_path: Path) -> None:
    """Prevents: a library's traceback for a file that is cut off."""
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    settings = Settings(model=str(tmp_path))
    for config in (
        '{"model_type": "llama", "hidden_size": 8}',
        '{"model_type": "nope"}',
        "{}",
        "{",
    ):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ModelError) as refusal:
            load_engine(settings, find_model(settings), ())
        assert "\n" not in str(refusal.value)


async def test_every_known_answer_is_read_through_the_engine() -> None:
    """Prevents: R33, a test that passes because nothing was asked."""

    class Watched(FakeEngine):
        asked: list[ScoreRequest]

        async def score(self, request: ScoreRequest) -> tuple[Reading, ...]:
            self.asked = [*getattr(self, "asked", []), request]
            return await super().score(request)

    probe = fake_probe()
    answers = build([(1, 2), (3, 4, 5)], lambda ids: [(9.0, 9.0)] * len(ids))
    engine = Watched(probes=[with_answers(probe, answers)])
    with pytest.raises(KnownAnswerError):
        await check_probes(engine, engine.probes, suppression=True)
    assert [request.token_ids for request in engine.asked] == [(1, 2), (3, 4, 5)]


async def test_a_context_that_holds_no_known_answer_is_a_sentence() -> None:
    """Prevents: a traceback for `--max-model-len 40`, and a reload that ends in silence."""
    probe = fake_probe()
    engine = FakeEngine(probes=[probe])
    answers = build([(1,) * (engine.card.max_model_len + 1)], lambda ids: [(0.0, 0.0)] * len(ids))
    with pytest.raises(
        KnownAnswerError, match=r"texts of up to \d+ tokens.* raise --max-model-len"
    ):
        await check_probes(engine, [with_answers(probe, answers)], suppression=True)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r._replace(logits=(r.logits[0] + 0.1, *r.logits[1:])), "computes otherwise"),
        (lambda r: r._replace(logits=(float("nan"),) * len(r.logits)), "computes otherwise"),
        (lambda r: r._replace(position=r.position + 1), "misplaces readings"),
        (lambda r: None, "misplaces readings"),
    ],
)
async def test_an_engine_that_decodes_otherwise_than_it_reads_does_not_start(
    alpha: float, change: Callable[[Reading], Reading | None], reason: str
) -> None:
    """Prevents: a graph of decoding, or of suppression, that nothing looked at before traffic."""

    class Decodes(FakeEngine):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[Step, None]:
            async for step in super().generate(request):
                assert step.reading is not None
                at_end = step.token_id is None and request.alpha == alpha
                yield step._replace(reading=change(step.reading)) if at_end else step

    probe = fake_probe()
    await check_probes(FakeEngine(probes=[probe]), [probe], suppression=True)
    engine = Decodes(probes=[probe])
    with pytest.raises(KnownAnswerError, match=reason):
        await check_probes(engine, [probe], suppression=True)


async def test_an_engine_that_loses_the_hidden_step_does_not_start() -> None:
    """Prevents: a traceback in the place of a refusal, and a reload that is never undone."""

    class Loses(FakeEngine):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[Step, None]:
            async for step in super().generate(request):
                if step.token_id is not None:
                    yield step

    engine = Loses(probes=[fake_probe()])
    with pytest.raises(KnownAnswerError, match="loses or misplaces"):
        await check_probes(engine, engine.probes, suppression=True)


async def test_a_dead_engine_passes_no_test() -> None:
    """Prevents: readiness when the engine could not answer."""

    class Dead(FakeEngine):
        async def score(self, request: ScoreRequest) -> tuple[Reading, ...]:
            raise EngineDeadError("gone")

    probe = fake_probe()
    answers = build([(1,)], lambda ids: [(0.0, 0.0)])
    dead = Dead(probes=[with_answers(probe, answers)])
    with pytest.raises(EngineDeadError):
        await check_probes(dead, dead.probes, suppression=True)


def with_answers(probe: Probe, answers: tuple[KnownAnswer, ...]) -> Probe:
    card = msgspec.structs.replace(probe.card, known_answers=answers)
    return dataclasses.replace(probe, card=card)
