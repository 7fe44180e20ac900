"""Verb `sweep`: what alpha does to behaviour, with random neurons as control, and what it costs.

behaviour sets, probe -> sweep/ (controls, answers, perplexities, pictures) and sweep.json, the
figures.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import httpx

from offline import report_charts
from offline.child_server import child_server
from offline.controls import load_or_make_controls
from offline.models import load_model, load_tokenizer, short_name
from offline.perplexity import Surprise, measure, read_prose
from offline.records import SweepAnswer, read_records, sort_records, write_atomic
from offline.sweep_answers import (
    PROBED,
    SweepError,
    SweepSettings,
    ask_all,
    asks,
    conditions,
    cut,
    missing,
    read_sets,
    sweep_header,
)
from offline.sweep_figures import SweepFigures, make_figures
from probes.probe import Probe

log = logging.getLogger(__name__)

PROSE = Path(__file__).parent / "data" / "prose.jsonl"


def sweep(
    model: str,
    probe_path: Path,
    out: Path,
    *,
    behaviour: Sequence[Path],
    settings: SweepSettings,
    base_url: str | None = None,
    revision: str | None = None,
    in_flight: int = 32,
    api_key: str | None = None,
) -> SweepFigures:
    """Ask what is missing and write `out`/sweep.json; a second run asks nothing.

    The model is loaded here first, for controls and perplexities, and let go before a server is
    started. A server at `base_url` must hold the probe and the controls.
    """
    probe, sets = Probe.load(probe_path), read_sets(behaviour, seed=settings.seed)
    tokenizer = load_tokenizer(model, revision=revision)
    header = sweep_header(probe, sets, settings, model_id=short_name(model), tokenizer=tokenizer)
    folder, answers = out / "sweep", out / "sweep" / "answers.jsonl"
    dtype = probe.card.model.dtype  # another one would be another model to the probe
    loaded = load_model(model, revision=revision, tokenizer=tokenizer, dtype=dtype)
    paths = {PROBED: probe_path} | load_or_make_controls(
        folder, probe, count=settings.controls, seed=settings.seed, loaded=loaded
    )
    probes = {neurons: Probe.load(path) for neurons, path in paths.items()}
    measure(
        loaded,
        [tokenizer.tokenizer.encode(prose.text) for prose in read_prose(PROSE)],
        probes,
        conditions(probes, settings.alphas),
        path=folder / "perplexity.jsonl",
        header=header,
    )
    del loaded  # before a server loads it again

    wanted = asks(sets, {neurons: p.card.name for neurons, p in probes.items()}, settings)
    lacking = missing(wanted, answers, header)
    if lacking:
        served = [str(path) for path in paths.values()]
        child = child_server(
            model, revision=revision, dtype=dtype, in_flight=in_flight, probes=served
        )
        with nullcontext(base_url) if base_url else child as url:
            require_probes(url, probes, paths, api_key=api_key, trust_env=bool(base_url))
            asyncio.run(
                ask_all(
                    lacking,
                    answers,
                    base_url=url,
                    header=header,
                    settings=settings,
                    in_flight=in_flight,
                    done=len(wanted) - len(lacking),
                    api_key=api_key,
                    trust_env=bool(base_url),
                )
            )
    sort_records(answers, SweepAnswer)
    figures = make_figures(
        header,
        cut(sets, settings.items),
        read_records(answers, SweepAnswer)[1],
        read_records(folder / "perplexity.jsonl", Surprise)[1],
        probes=probes,
        alphas=settings.alphas,
    )
    figures.save(out / "sweep.json")
    for name, picture in report_charts.doses(figures).items():
        file_name = f"{name.lower().replace(' ', '_')}.svg"
        write_atomic(folder / file_name, report_charts.standalone(picture))
    for slope in figures.slopes:
        log.info(
            "%-20s %-10s %-14s %+.3f per alpha [%+.3f, %+.3f]",
            *(slope.behaviour, slope.measure, slope.neurons, slope.value, slope.low, slope.high),
        )
    return figures


def require_probes(
    base_url: str,
    probes: Mapping[str, Probe],
    paths: Mapping[str, Path],
    *,
    api_key: str | None,
    trust_env: bool = True,
) -> None:
    """SweepError unless the server holds exactly these probes (names can be given twice) and lets
    requests scale their neurons."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    root = base_url.rstrip("/").removesuffix("/v1")
    try:
        response = httpx.get(
            f"{root}/v1/probes", headers=headers, timeout=30.0, trust_env=trust_env
        )
        response.raise_for_status()
        served = {entry["id"]: entry["suppression"] for entry in response.json()["data"]}
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as exc:
        raise SweepError(f"{base_url} does not tell its probes: {exc}") from exc
    lacking = [neurons for neurons, probe in probes.items() if probe.id not in served]
    if lacking:
        flags = " ".join(f"--probe {path}" for path in paths.values())
        raise SweepError(f"{base_url} has not loaded {lacking}; start it with {flags}")
    if not all(served[probe.id] for probe in probes.values()):
        raise SweepError(f"{base_url} does not let requests set alpha; start it with --suppression")
