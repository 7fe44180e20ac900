"""The verbs of a run, as the command line has them: what each reads, does and writes.

Libraries are imported where they are needed: `--help` must not wait for torch.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import msgspec

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
    verb.ask_all(
        model, out, asked, sampling, base_url=base_url, revision=revision, in_flight=in_flight,
        model_dtype=model_dtype, api_key=os.environ.get("OPENAI_API_KEY"),
    )  # fmt: skip


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
    from offline.shards import FOLDERS, features_header, parse_position

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
                out / FOLDERS[name],
                header=features_header(
                    loaded.identity,
                    parse_position(position),
                    sha256(out / name),
                    dtype=dtype,
                ),
                part=share,
            )


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
    from offline.collect import ask_all
    from offline.records import Answer, Label, read_records

    if not best_of:
        return
    _, answers = read_records(out / "answers.jsonl", Answer)
    _, labels = read_records(out / "labels.jsonl", Label)
    again = verb.questions_again(
        answers, labels, transfer=frozenset(transfer or ()), seed=split_seed
    )
    samples = out / verb.FOLDER
    ask_all(
        model, samples, again, verb.sampling(best_of, seed), base_url=base_url, revision=revision,
        in_flight=in_flight, model_dtype=model_dtype, api_key=os.environ.get("OPENAI_API_KEY"),
    )  # fmt: skip
    label(
        model, samples, revision, judge=judge, judge_url=judge_url, judge_model=judge_model,
        agree=0, wrong_per_right=0.0, in_flight=in_flight, split_seed=split_seed,
        transfer=transfer,
    )  # fmt: skip
    extract(model, samples, revision, position, dtype, model_dtype, device_map)


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
    from offline.fit_result import FitSettings, parse_design
    from offline.heads import HeadSettings
    from offline.l1_path import parse_solver

    settings = FitSettings(
        seed=split_seed,
        heads=HeadSettings(solver=parse_solver(solver)),
        design=parse_design(design or ("3-vs-1" if paper else "tokens")),
        c=c,
        max_neurons=max_neurons,
        transfer=tuple(transfer or ()),
    )
    data = load_dataset(out, transfer=frozenset(settings.transfer), seed=split_seed)
    verb.fit(data, settings).save(out / "fit.json")


@holds_run
def evaluate(out: Run) -> None:
    """Judge the probe on unseen relations and questions, beside the baselines."""
    from offline import evaluate as verb
    from offline.best_of import samples_of
    from offline.dataset import load_dataset
    from offline.fit_result import FitResult
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
    from offline.fit_result import FitResult
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
        training=verb.training_facts(out, result, data, command=command_line(), license=license),
    )


@holds_run
def report(model: Model, out: Run, revision: Revision = None) -> None:
    """Everything that is known about the run: report.json and report.html."""
    from offline import report as verb
    from offline.dataset import load_dataset
    from offline.evaluate import Evaluation
    from offline.fit_result import FitResult
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


def command_line() -> str:
    """The command line as typed, without the folders of this machine."""
    typed = (Path(word).name if word.startswith("/") else word for word in sys.argv[1:])
    return f"python -m offline {shlex.join(typed)}"
