"""The verbs from questions to features, as the command line has them.

Libraries are imported where they are needed: `--help` must not wait for torch.
"""

from __future__ import annotations

import os

import msgspec

from offline.options import (
    Agree,
    BaseURL,
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
