"""The verbs from questions to features, as the command line has them.

Libraries are imported where they are needed: `--help` must not wait for torch.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from offline.options import (
    Agree,
    BaseURL,
    BestOf,
    DeviceMap,
    Dtype,
    Given,
    InFlight,
    JudgeModel,
    JudgeName,
    JudgeURL,
    MaxTokens,
    Model,
    ModelDtype,
    MoreSamples,
    Paper,
    PartOfShards,
    Position,
    Questions,
    ResidualLayers,
    Revision,
    RightPerWrong,
    Run,
    Samples,
    Seed,
    ServedModel,
    Spans,
    SplitSeed,
    Temperature,
    Told,
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
    served_model: ServedModel = None,
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
        model, out, asked, sampling, base_url=base_url, served_model=served_model,
        revision=revision, in_flight=in_flight, model_dtype=model_dtype,
        api_key=os.environ.get("OPENAI_API_KEY"),
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
    residual_layer: ResidualLayers = None,
    given: Given = None,
    part: PartOfShards = "1/1",
) -> None:
    """Read every neuron at every token of the labelled answers."""
    from filelock import FileLock

    from offline import extract as verb
    from offline.given_text import given_texts
    from offline.models import load_model, load_tokenizer
    from offline.records import read_labelled, sha256, write_records
    from offline.shards import FOLDERS, features_header, parse_position

    share = verb.Part.parse(part)
    with locked(out, LOCK if share == verb.EVERY_SHARD else f"{LOCK}-part-{share.first}"):
        tokenizer = load_tokenizer(model, revision=revision)
        header, answers, said, labels = read_labelled(out)
        tokenizer.check(header, out / "answers.jsonl")
        loaded = load_model(
            model,
            revision=revision,
            tokenizer=tokenizer,
            dtype=model_dtype,
            device_map=device_map,
        )
        sets = {"labels.jsonl": verb.make_items(answers, labels, end_tokens=loaded.end_tokens)}
        if given:
            texts = given_texts(given, tokenizer.tokenizer, seed=int(said["split_seed"]))
            made = msgspec.structs.replace(header, kind="given", settings={})
            with FileLock(out / ".lock-given"):  # processes that share the shards make it alike
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
                    residual_layers=residual_layer or (),
                ),
                part=share,
            )


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
    from offline.collect import PAPER, ask_all
    from offline.models import load_tokenizer
    from offline.records import read_labelled
    from offline.splits import Split

    verb.require_asked(out, samples=more_samples, told=told)
    if not (more_samples or told):
        return
    _, answers, said, _ = read_labelled(out)
    split = Split.of(said)
    if more_samples:
        samples = out / verb.SAMPLES
        longest = max_tokens or (PAPER.max_tokens if paper else None)
        ask_all(
            model, samples, verb.questions_of_fit(answers, split),
            verb.sampling(more_samples, seed, longest), base_url=base_url,
            served_model=served_model, revision=revision, in_flight=in_flight,
            model_dtype=model_dtype, api_key=os.environ.get("OPENAI_API_KEY"),
        )  # fmt: skip
        _label_whole(model, samples, revision, judge, judge_url, judge_model, in_flight, split.seed)
        verb.keep_new(out, samples)
        extract(model, samples, revision, position, dtype, model_dtype, device_map, residual_layer)
    if told:
        verb.tell(out, out / verb.TOLD, load_tokenizer(model, revision=revision).tokenizer)
        extract(
            model, out / verb.TOLD, revision, position, dtype, model_dtype, device_map,
            residual_layer,
        )  # fmt: skip


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
    from offline.collect import PAPER, ask_all
    from offline.records import read_labelled
    from offline.splits import Split

    if not best_of:
        return
    _, answers, said, labels = read_labelled(out)
    split = Split.of(said)
    again = verb.questions_again(answers, labels, split)
    samples = out / verb.FOLDER
    longest = max_tokens or (PAPER.max_tokens if paper else None)
    ask_all(
        model, samples, again, verb.sampling(best_of, seed, longest), base_url=base_url,
        served_model=served_model, revision=revision, in_flight=in_flight, model_dtype=model_dtype,
        api_key=os.environ.get("OPENAI_API_KEY"),
    )  # fmt: skip
    _label_whole(model, samples, revision, judge, judge_url, judge_model, in_flight, split.seed)
    extract(model, samples, revision, position, dtype, model_dtype, device_map, residual_layer)


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
