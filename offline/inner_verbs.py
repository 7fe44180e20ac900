"""The verbs that make runs within a run, as the command line has them.

Libraries are imported where they are needed: `--help` must not wait for torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from offline.feature_verbs import extract, label
from offline.options import (
    BaseURL,
    BestOf,
    DeviceMap,
    Dtype,
    InFlight,
    JudgeModel,
    JudgeName,
    JudgeURL,
    MaxTokens,
    Model,
    ModelDtype,
    MoreSamples,
    Paper,
    Position,
    ResidualLayers,
    Revision,
    Run,
    Seed,
    ServedModel,
    Told,
)
from offline.run_folder import holds_run

if TYPE_CHECKING:
    from offline.collect import Sampling
    from offline.questions import Question


@holds_run
def augment(
    model: Model,
    out: Run,
    more_samples: MoreSamples = 0,
    told: Told = False,
    base_url: BaseURL = None,
    served_model: ServedModel = None,
    revision: Revision = None,
    judge: JudgeName = "alias",
    judge_url: JudgeURL = None,
    judge_model: JudgeModel = None,
    position: Position = "read",
    dtype: Dtype = "float16",
    model_dtype: ModelDtype = "auto",
    device_map: DeviceMap = None,
    residual_layer: ResidualLayers = None,
    seed: Seed = 0,
    paper: Paper = False,
    max_tokens: MaxTokens = None,
    in_flight: InFlight = 32,
) -> None:
    """Make more answers to fit the answer head on: further samples, and told statements."""
    from offline import augment as verb
    from offline.models import load_tokenizer
    from offline.records import read_labelled
    from offline.splits import Split

    verb.require_asked(out, samples=more_samples, told=told)
    reading = (revision, position, dtype, model_dtype, device_map, residual_layer)
    if more_samples:
        _, answers, said, _ = read_labelled(out)
        split = Split.of(said)
        samples = out / verb.SAMPLES
        _ask(
            model, samples, verb.questions_of_fit(answers, split),
            verb.sampling(more_samples, seed, _longest(max_tokens, paper=paper)),
            base_url, served_model, revision, model_dtype, in_flight,
        )  # fmt: skip
        _label_whole(model, samples, revision, judge, judge_url, judge_model, in_flight, split.seed)
        verb.keep_new(out, samples)
        extract(model, samples, *reading)
    if told:
        verb.tell(out, out / verb.TOLD, load_tokenizer(model, revision=revision).tokenizer)
        extract(model, out / verb.TOLD, *reading)


@holds_run
def resample(
    model: Model,
    out: Run,
    best_of: BestOf = 0,
    base_url: BaseURL = None,
    served_model: ServedModel = None,
    revision: Revision = None,
    judge: JudgeName = "alias",
    judge_url: JudgeURL = None,
    judge_model: JudgeModel = None,
    position: Position = "read",
    dtype: Dtype = "float16",
    model_dtype: ModelDtype = "auto",
    device_map: DeviceMap = None,
    residual_layer: ResidualLayers = None,
    seed: Seed = 0,
    paper: Paper = False,
    max_tokens: MaxTokens = None,
    in_flight: InFlight = 32,
) -> None:
    """Ask some test questions several times: what choosing among samples gains."""
    from offline import best_of as verb
    from offline.records import read_labelled
    from offline.splits import Split

    if not best_of:
        return
    _, answers, said, labels = read_labelled(out)
    split = Split.of(said)
    samples = out / verb.FOLDER
    _ask(
        model, samples, verb.questions_again(answers, labels, split),
        verb.sampling(best_of, seed, _longest(max_tokens, paper=paper)),
        base_url, served_model, revision, model_dtype, in_flight,
    )  # fmt: skip
    _label_whole(model, samples, revision, judge, judge_url, judge_model, in_flight, split.seed)
    extract(model, samples, revision, position, dtype, model_dtype, device_map, residual_layer)


def _longest(max_tokens: int | None, *, paper: bool) -> int | None:
    """Tokens of an answer, as `collect` allows them; None: by its style."""
    from offline.collect import PAPER

    return max_tokens or (PAPER.max_tokens if paper else None)


def _ask(
    model: str,
    samples: Path,
    questions: Sequence[Question],
    sampling: Sampling,
    base_url: str | None,
    served_model: str | None,
    revision: str | None,
    model_dtype: str,
    in_flight: int,
) -> None:
    from offline.collect import ask_all

    ask_all(
        model, samples, questions, sampling, base_url=base_url, served_model=served_model,
        revision=revision, in_flight=in_flight, model_dtype=model_dtype,
        api_key=os.environ.get("OPENAI_API_KEY"),
    )  # fmt: skip


def _label_whole(
    model: str,
    samples: Path,
    revision: str | None,
    judge: str,
    judge_url: str | None,
    judge_model: str | None,
    in_flight: int,
    split_seed: int,
) -> None:
    """Whole answers: nobody looks for their claims, and what does so is not asked."""
    label(
        model, samples, revision, judge=judge,
        judge_url=judge_url if judge == "llm" else None,
        judge_model=judge_model if judge in ("llm", "nli") else None,
        agree=0, wrong_per_right=0.0, in_flight=in_flight, split_seed=split_seed,
    )  # fmt: skip
