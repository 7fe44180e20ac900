"""`python -m offline VERB`: from questions to a probe, one verb per step, all of them by `train`.

A run is a folder: answers.jsonl, labels.jsonl, features/, fit.json, evaluation.json, probe/. Each
verb reads what the one before it wrote, goes on where it was stopped, and can be run alone.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from offline.feature_verbs import collect, extract, label
from offline.inner_verbs import augment, resample
from offline.probe_verbs import evaluate, fit, publish, report
from offline.records import RecordError
from offline.run_folder import holds_run
from offline.tools import crossvalidate, inspect, push, sweep, transfer
from offline.whole_run import TIMES, in_turn, union_of
from probes.errors import HNeuronsError

log = logging.getLogger(__name__)

STAGES = (collect, label, extract, augment, resample, fit, evaluate, publish, report)
TOOLS = (crossvalidate, sweep, push, inspect, transfer)


def train(**given: object) -> None:
    """Every verb in turn: from questions to a probe that a server loads."""
    run = given["out"]
    assert isinstance(run, Path)
    refuse_early(given)
    for stage, seconds in in_turn(STAGES, given, run / TIMES):
        log.info("%-10s %6.0f s", stage, seconds)
    probe = given["to"] or run / "probe"
    print(
        f"look at {run / 'report.html'}\n"
        f"serve it: python -m server {given['model']} --probe {probe}{_as_loaded(given)}\n"
        f"share it: python -m offline push {probe} ORG/NAME"
    )


def refuse_early(given: Mapping[str, object]) -> None:
    """RecordError for options that contradict each other: `fit` would say so hours later."""
    from offline.fit_result import fit_settings
    from offline.label import label_settings

    options: dict[str, Any] = dict(given)
    label_settings(
        options["paper"],
        **{name: options[name] for name in ("judge", "spans", "judge_url", "judge_model")},
    )
    settings = fit_settings(
        options["design"] or ("3-vs-1" if options["paper"] else "tokens"),
        seed=0,
        **{name: options[name] for name in ("solver", "max_neurons", "c")},
    )
    if settings.design != "tokens" and (options["more_samples"] or options["told"]):
        raise RecordError(
            f"--more-samples and --told are of --design tokens; leave them out of a fit by the "
            f"paper's {settings.design}"
        )


def _as_loaded(given: Mapping[str, object]) -> str:
    """What a server must be told to load the model that the probe belongs to."""
    said = {"dtype": given["model_dtype"], "revision": given["revision"]}
    return "".join(
        f" --{name} {shlex.quote(str(value))}"
        for name, value in said.items()
        if value not in (None, "auto")
    )


# Who shares the work of `extract` is no matter of the whole.
train.__signature__ = union_of(STAGES, without=("part",))  # type: ignore[attr-defined]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for verb in (holds_run(train), *STAGES, *TOOLS):
    app.command()(verb)


def main() -> None:
    """Console script `hneurons-offline`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        app()
    except (HNeuronsError, OSError) as error:  # of the latter: a full disk, a folder of others
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
