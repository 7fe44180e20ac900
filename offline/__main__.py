"""`python -m offline VERB`: from questions to a probe, one verb per step, all of them by `train`.

A run is a folder: answers.jsonl, labels.jsonl, features/, fit.json, evaluation.json, probe/. Each
verb reads what the one before it wrote, goes on where it was stopped, and can be run alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from offline.options import (
    Agree,
    BaseURL,
    BestOf,
    C,
    DesignName,
    DeviceMap,
    Dtype,
    Given,
    InFlight,
    JudgeModel,
    JudgeName,
    JudgeURL,
    License,
    MaxNeurons,
    MaxTokens,
    Model,
    ModelDtype,
    Name,
    Paper,
    PartOfShards,
    Position,
    Questions,
    Revision,
    RightPerWrong,
    Run,
    Samples,
    Seed,
    Solver,
    Spans,
    SplitSeed,
    Temperature,
    To,
    TopK,
    TopP,
    Transfer,
    WrongPerRight,
)
from offline.run_folder import LOCK, holds_run, locked
from offline.splits import SPLIT_SEED
from offline.whole_run import TIMES, in_turn, union_of
from probes.errors import HNeuronsError

if TYPE_CHECKING:
    from offline.collect import Sampling
    from offline.questions import Question

log = logging.getLogger(__name__)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
@holds_run
def collect(
    model: Model,
    out: Run,
    questions: Questions,
    base_url: BaseURL = None,
    revision: Revision = None,
    paper: Paper = False,
    samples: Samples = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    in_flight: InFlight = 32,
    model_dtype: ModelDtype = "auto",
) -> None:
    """Ask the questions of a server and keep the answers with their token ids."""
    from offline import collect as verb
    from offline.questions import Source, check_unique, read_questions, shuffle_key

    asked = [q for text in questions for q in read_questions(Source.parse(text))]
    check_unique(asked)
    asked.sort(key=lambda question: shuffle_key(question.id))  # what a cut run has is no bias
    sampling = verb.sampling(
        paper,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        seed=seed,
    )
    _collect(
        model, out, asked, sampling, base_url=base_url, revision=revision, in_flight=in_flight,
        model_dtype=model_dtype,
    )  # fmt: skip


@app.command()
@holds_run
def label(
    model: Model,
    out: Run,
    revision: Revision = None,
    paper: Paper = False,
    judge: JudgeName = "alias",
    spans: Spans = "rule",
    judge_url: JudgeURL = None,
    judge_model: JudgeModel = None,
    agree: Agree = None,
    wrong_per_right: WrongPerRight = None,
    right_per_wrong: RightPerWrong = None,
    in_flight: InFlight = 32,
    split_seed: SplitSeed = SPLIT_SEED,
    transfer: Transfer = None,
) -> None:
    """Judge the answers and find the tokens of their claims."""
    from offline import label as verb
    from offline.models import load_tokenizer

    settings = verb.label_settings(
        paper,
        judge=judge,
        spans=spans,
        judge_url=judge_url,
        judge_model=judge_model,
        agree=agree,
        wrong_per_right=wrong_per_right,
        right_per_wrong=right_per_wrong,
        in_flight=in_flight,
        split_seed=split_seed,
        transfer=tuple(transfer or ()),
    )
    verb.label_answers(
        out / "answers.jsonl",
        out / "labels.jsonl",
        tokenizer=load_tokenizer(model, revision=revision),
        settings=settings,
        api_key=os.environ.get("JUDGE_API_KEY"),
    )


@app.command()
def extract(
    model: Model,
    out: Run,
    revision: Revision = None,
    position: Position = "read",
    dtype: Dtype = "float16",
    model_dtype: ModelDtype = "auto",
    device_map: DeviceMap = None,
    given: Given = None,
    part: PartOfShards = "1/1",
) -> None:
    """Read every neuron at every token of the labelled answers."""
    from offline import extract as verb
    from offline.given_text import given_texts
    from offline.models import load_model, load_tokenizer
    from offline.records import Answer, Label, read_records, sha256, write_records

    share = verb.Part.parse(part)
    with locked(out, LOCK if share == verb.EVERY_SHARD else f"{LOCK}-part-{share.first}"):
        tokenizer = load_tokenizer(model, revision=revision)
        header, answers = read_records(out / "answers.jsonl", Answer)
        tokenizer.check(header, out / "answers.jsonl")
        said, labels = read_records(out / "labels.jsonl", Label)
        loaded = load_model(
            model,
            revision=revision,
            tokenizer=tokenizer,
            dtype=model_dtype,
            device_map=device_map,
        )
        sets = {"labels.jsonl": verb.make_items(answers, labels, end_tokens=loaded.end_tokens)}
        if given:
            texts = given_texts(given, tokenizer.tokenizer, seed=int(said.settings["split_seed"]))
            made = msgspec.structs.replace(header, kind="given", settings={})
            write_records(out / "given.jsonl", made, texts)
            sets["given.jsonl"] = [text.item() for text in texts]
        for name, items in sets.items():
            verb.extract(
                loaded.model,
                items,
                out / verb.FOLDERS[name],
                header=verb.features_header(
                    loaded.identity,
                    verb.parse_position(position),
                    sha256(out / name),
                    dtype=dtype,
                ),
                part=share,
            )


@app.command()
@holds_run
def resample(
    model: Model,
    out: Run,
    best_of: BestOf = 0,
    base_url: BaseURL = None,
    revision: Revision = None,
    judge: JudgeName = "alias",
    judge_url: JudgeURL = None,
    judge_model: JudgeModel = None,
    position: Position = "read",
    dtype: Dtype = "float16",
    model_dtype: ModelDtype = "auto",
    device_map: DeviceMap = None,
    seed: Seed = 0,
    split_seed: SplitSeed = SPLIT_SEED,
    transfer: Transfer = None,
    in_flight: InFlight = 32,
) -> None:
    """Ask some test questions several times: what choosing among samples gains."""
    from offline import best_of as verb
    from offline.records import Answer, Label, read_records

    if not best_of:
        return
    _, answers = read_records(out / "answers.jsonl", Answer)
    _, labels = read_records(out / "labels.jsonl", Label)
    again = verb.questions_again(
        answers, labels, transfer=frozenset(transfer or ()), seed=split_seed
    )
    samples = out / verb.FOLDER
    _collect(
        model, samples, again, verb.sampling(best_of, seed), base_url=base_url, revision=revision,
        in_flight=in_flight, model_dtype=model_dtype,
    )  # fmt: skip
    label(
        model, samples, revision, judge=judge, judge_url=judge_url, judge_model=judge_model,
        agree=0, wrong_per_right=0.0, in_flight=in_flight, split_seed=split_seed,
        transfer=transfer,
    )  # fmt: skip
    extract(model, samples, revision, position, dtype, model_dtype, device_map)


@app.command()
@holds_run
def fit(
    out: Run,
    transfer: Transfer = None,
    solver: Solver = "skglm",
    max_neurons: MaxNeurons = 300,
    split_seed: SplitSeed = SPLIT_SEED,
    paper: Paper = False,
    design: DesignName = None,
    c: C = 1.0,
) -> None:
    """Fit, choose and calibrate a probe."""
    from offline import fit as verb
    from offline.dataset import load_dataset
    from offline.heads import HeadSettings
    from offline.l1_path import parse_solver

    settings = verb.FitSettings(
        seed=split_seed,
        heads=HeadSettings(solver=parse_solver(solver)),
        design=verb.parse_design(design or ("3-vs-1" if paper else "tokens")),
        c=c,
        max_neurons=max_neurons,
        transfer=tuple(transfer or ()),
    )
    data = load_dataset(out, transfer=frozenset(settings.transfer), seed=split_seed)
    verb.fit(data, settings).save(out / "fit.json")


@app.command()
@holds_run
def evaluate(out: Run) -> None:
    """Judge the probe on unseen relations and questions, beside the baselines."""
    from offline import evaluate as verb
    from offline.best_of import samples_of
    from offline.dataset import load_dataset
    from offline.fit import FitResult
    from offline.given_rows import load_given

    result = FitResult.load(out / "fit.json")
    data = load_dataset(
        out, transfer=frozenset(result.settings.transfer), seed=result.settings.seed
    )
    given = load_given(out, like=data.features.header)
    folder = samples_of(out)
    seed = result.settings.seed
    samples = load_dataset(folder, transfer=frozenset(), seed=seed) if folder else None
    verb.evaluate(data, result, given, samples).save(out / "evaluation.json")


@app.command()
@holds_run
def publish(
    model: Model,
    out: Run,
    name: Name,
    revision: Revision = None,
    model_dtype: ModelDtype = "auto",
    device_map: DeviceMap = None,
    license: License = "apache-2.0",
    to: To = None,
) -> None:
    """Write the folder that `python -m server MODEL --probe FOLDER` loads."""
    from offline import publish as verb
    from offline.dataset import load_dataset
    from offline.evaluate import Evaluation
    from offline.fit import FitResult
    from offline.models import load_model, load_tokenizer

    result = FitResult.load(out / "fit.json")
    data = load_dataset(
        out, transfer=frozenset(result.settings.transfer), seed=result.settings.seed
    )
    tokenizer = load_tokenizer(model, revision=revision)
    verb.publish(
        to or out / "probe",
        name=name,
        result=result,
        evaluation=Evaluation.load(out / "evaluation.json"),
        data=data,
        loaded=load_model(
            model,
            revision=revision,
            tokenizer=tokenizer,
            dtype=model_dtype,
            device_map=device_map,
        ),
        training=verb.training_facts(out, result, data, command=_command(), license=license),
    )


@app.command()
@holds_run
def sweep(
    model: Model,
    out: Run,
    probe: Annotated[Path, typer.Option(help="folder of the probe whose neurons are scaled")],
    base_url: BaseURL = None,
    revision: Revision = None,
    behaviour: Annotated[
        list[Path] | None,
        typer.Option(help="JSON Lines file of a behaviour set, repeatable (default: our own)"),
    ] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="repeatable; 1 is added")] = None,
    controls: Annotated[int, typer.Option(min=0, help="sets of random neurons")] = 3,
    items: Annotated[int, typer.Option(min=0, help="per behaviour set; 0: all")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 48,
    seed: Seed = 0,
    in_flight: InFlight = 32,
) -> None:
    """What alpha does to behaviour, beside random neurons, and what it costs."""
    from offline import sweep as verb
    from offline.sweep_answers import NO_CHANGE, SweepSettings

    settings = SweepSettings(
        alphas=tuple(sorted({NO_CHANGE, *alpha})) if alpha else SweepSettings.alphas,
        controls=controls,
        items=items,
        max_tokens=max_tokens,
        seed=seed,
    )
    verb.sweep(
        model,
        probe,
        out,
        behaviour=behaviour or [],
        settings=settings,
        base_url=base_url,
        revision=revision,
        in_flight=in_flight,
        api_key=os.environ.get("OPENAI_API_KEY"),
    )


@app.command()
@holds_run
def report(model: Model, out: Run, revision: Revision = None) -> None:
    """Everything that is known about the run: report.json and report.html."""
    from offline import report as verb
    from offline.dataset import load_dataset
    from offline.evaluate import Evaluation
    from offline.fit import FitResult
    from offline.models import load_tokenizer
    from offline.records import write_atomic
    from offline.report_page import render

    result = FitResult.load(out / "fit.json")
    data = load_dataset(
        out, transfer=frozenset(result.settings.transfer), seed=result.settings.seed
    )
    verb.make_report(
        out,
        result,
        Evaluation.load(out / "evaluation.json"),
        data,
        load_tokenizer(model, revision=revision),
    ).save(out / "report.json")
    write_atomic(out / "report.html", render(verb.Report.load(out / "report.json")).encode())


def train(**given: object) -> None:
    """Every verb in turn: from questions to a probe that a server loads."""
    run = given["out"]
    assert isinstance(run, Path)
    for stage, seconds in in_turn(STAGES, given, run / TIMES):
        log.info("%-10s %6.0f s", stage, seconds)
    probe = given["to"] or run / "probe"
    print(
        f"look at {run / 'report.html'}\n"
        f"serve it: python -m server {given['model']} --probe {probe}\n"
        f"share it: python -m offline push {probe} ORG/NAME"
    )


STAGES = (collect, label, extract, resample, fit, evaluate, publish, report)
# Who shares the work of `extract` is no matter of the whole.
train.__signature__ = union_of(STAGES, without=("part",))  # type: ignore[attr-defined]
app.command()(holds_run(train))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="folder of a probe, as `publish` writes it")],
    repository: Annotated[str, typer.Argument(help="org/name on the hub; made if it is not there")],
    private: Annotated[bool, typer.Option(help="when it has to be made")] = False,
) -> None:
    """Upload a probe to the hub; prints what `python -m server MODEL --probe ..` loads."""
    from offline import hub

    print(hub.push(folder, repository, private=private))


@app.command()
def inspect(
    model: Model,
    text: Annotated[str, typer.Option(help="what the model reads")],
    revision: Revision = None,
    layer: Annotated[int | None, typer.Option(min=0, help="this layer alone")] = None,
    top: Annotated[int, typer.Option(min=1, help="neurons that are named")] = 3,
    plot: Annotated[Path | None, typer.Option(help="picture to write (.png, .svg, .pdf)")] = None,
) -> None:
    """Show per layer how large CETT is, which neurons lead, and how few carry half of it."""
    from offline import inspect as verb
    from offline.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(model, revision=revision)
    loaded = load_model(model, revision=revision, tokenizer=tokenizer)
    token_ids = tokenizer.tokenizer.encode(text)
    layers = verb.inspect(loaded.model, token_ids, layer=layer)
    print(verb.table(layers, top=top))
    if plot is not None:
        verb.plot(layers, plot, title=f"{loaded.identity.model_id}, {len(token_ids)} tokens")


@app.command()
def transfer(
    probe: Annotated[Path, typer.Argument(help="folder of the probe")],
    sibling: Annotated[str, typer.Argument(help="hub id or folder of a model of equal shape")],
    run: Annotated[Path, typer.Option(help="folder of the run that the probe is from")],
    revision: Revision = None,
    model: Annotated[
        str | None, typer.Option(help="the probe's own model: tells how far its neurons moved")
    ] = None,
    device_map: DeviceMap = None,
) -> None:
    """Read a sibling model with a probe: AUROC on both, and the drift of the probe's neurons."""
    from offline import transfer as verb
    from offline.models import load_model, load_tokenizer
    from probes.probe import Probe

    tokenizer = load_tokenizer(sibling, revision=revision)
    other = load_model(sibling, revision=revision, tokenizer=tokenizer, device_map=device_map)
    own = None
    if model is not None:
        own = load_model(model, revision=None, tokenizer=load_tokenizer(model, revision=None))
    with locked(run):
        found = verb.transfer(Probe.load(probe), other, run, own=own)
    print(verb.table(found))


def _collect(
    model: str,
    out: Path,
    asked: Sequence[Question],
    sampling: Sampling,
    *,
    base_url: str | None,
    revision: str | None,
    in_flight: int,
    model_dtype: str,
) -> None:
    from offline import collect as verb
    from offline.child_server import child_server
    from offline.models import load_tokenizer, short_name
    from offline.records import Answer, sort_records, versions

    tokenizer = load_tokenizer(model, revision=revision)
    header = verb.answers_header(
        short_name(model),
        tokenizer_sha256=tokenizer.tokenizer_sha256,
        chat_template_sha256=tokenizer.chat_template_sha256,
        sampling=sampling,
        libraries=versions(),
    )
    path = out / "answers.jsonl"
    asks = verb.missing(asked, path, header=header, samples=sampling.samples)
    if asks:
        server = child_server(model, revision=revision, dtype=model_dtype, in_flight=in_flight)
        with nullcontext(base_url) if base_url else server as url:
            asyncio.run(
                verb.collect(
                    asks,
                    path,
                    base_url=url,
                    header=header,
                    sampling=sampling,
                    in_flight=in_flight,
                    done=len(asked) * sampling.samples - len(asks),
                    api_key=os.environ.get("OPENAI_API_KEY"),
                )
            )
    sort_records(path, Answer)


def _command() -> str:
    """The command line as typed, without the folders of this machine."""
    typed = (Path(word).name if word.startswith("/") else word for word in sys.argv[1:])
    return f"python -m offline {shlex.join(typed)}"


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
