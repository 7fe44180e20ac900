"""Options of the command line, each said once: name, type and help; a verb adds its default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="hub id or folder of the model")]
Run = Annotated[Path, typer.Option("--out", help="folder of the run")]
Questions = Annotated[
    list[str],
    typer.Option(
        "--questions",
        help="PATH:STYLE[:PER_GROUP[:SKIP]], repeatable; styles: complete, answer_only, ask, "
        "ordinary",
    ),
]
Revision = Annotated[str | None, typer.Option(help="commit of a hub id, 40 hex digits")]
BaseURL = Annotated[str | None, typer.Option(help="server to ask (default: start one)")]
ServedModel = Annotated[
    str | None,
    typer.Option(
        help="what --base-url calls MODEL (default: its only model, or the one of the same name)"
    ),
]
Paper = Annotated[
    bool,
    typer.Option(
        "--paper",
        help="the paper's rule where nothing else is said: 10 samples of 50 tokens at temperature "
        "1, top_p .9, top_k 50, all of which agree; as many right as wrong answers",
    ),
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="answers per question with answers (default 1)")
]
Temperature = Annotated[float | None, typer.Option(min=0, help="0 is greedy (default 0)")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, help="(default 1)")]
TopK = Annotated[int | None, typer.Option(min=0, help="0 is off (default 0)")]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=1, help="longest answer to a question with answers (default: by its style)"),
]
InFlight = Annotated[int, typer.Option(min=1, help="requests at a time")]
JudgeName = Annotated[
    str,
    typer.Option(
        "--judge",
        help="alias (whole words), exact, regex; llm: a model behind --judge-url; nli: an "
        "inference model on this machine",
    ),
]
Spans = Annotated[str, typer.Option(help="how claims are found: rule, or llm")]
JudgeURL = Annotated[
    str | None, typer.Option(help="OpenAI-compatible server of llm; its key: $JUDGE_API_KEY")
]
JudgeModel = Annotated[
    str | None, typer.Option(help="as --judge-url names it; for nli a folder or ID[@REVISION]")
]
Agree = Annotated[
    int | None, typer.Option(min=1, help="samples of a question that must agree (default 1)")
]
WrongPerRight = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="wrong answers kept per right one of a source and style; 0: all (default 3; with "
        "--paper 1)",
    ),
]
RightPerWrong = Annotated[float | None, typer.Option(min=0, help="the other way round (default 0)")]
Position = Annotated[str, typer.Option(help="read or write: which pass a token is scored in")]
Dtype = Annotated[str, typer.Option(help="of stored features: float16, bfloat16, float32")]
ModelDtype = Annotated[
    str, typer.Option(help="of the weights: auto (as saved), float32, bfloat16, float16")
]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto spreads a model over several GPUs (default: one device)")
]
PartOfShards = Annotated[
    str, typer.Option("--part", help="I/N: be the Ith of N processes that share the folder")
]
ResidualLayers = Annotated[
    list[int] | None,
    typer.Option(
        "--residual-layer",
        help="repeatable: layers (1: output of the first) that dense rivals read (default: five "
        "from a third of the depth on)",
    ),
]
Given = Annotated[
    list[str] | None,
    typer.Option(
        "--given",
        help="PATH:KIND[:MOST], repeatable: texts of others that the token head is tested on; "
        "kinds: facts (a question file), halueval, refchecker",
    ),
]
MoreSamples = Annotated[
    int,
    typer.Option(
        min=0,
        help="answers more of each question of the fit part that is answered in few words, sampled "
        "at temperature .7, for the answer head; 0: none",
    ),
]
Told = Annotated[
    bool,
    typer.Option(
        "--told",
        help="fit the answer head on statements, too, that nobody sampled: questions of the style "
        "complete with their accepted answer, and with another of the same relation",
    ),
]
BestOf = Annotated[
    int,
    typer.Option(
        min=0, help="samples of each of 100 test questions, of which the best is answered; 0: none"
    ),
]
Transfer = Annotated[
    list[str] | None, typer.Option(help="stem of a question file that is only evaluated on")
]
Solver = Annotated[str | None, typer.Option(help="skglm (default), or liblinear for small models")]
MaxNeurons = Annotated[int | None, typer.Option(min=10, help="neuron budget (default 300)")]
DesignName = Annotated[
    str | None,
    typer.Option(
        "--design",
        help="tokens (default), or the paper's: 1-vs-1 (claims), 3-vs-1 (claims and what stands "
        "around them; the default with --paper)",
    ),
]
C = Annotated[
    float | None, typer.Option(min=1e-6, help="of the paper's designs: liblinear's C (default 1)")
]
Seed = Annotated[int, typer.Option(help="of sampling")]
SplitSeed = Annotated[
    int, typer.Option(help="decides which relations and questions judge the probe, and its folds")
]
Name = Annotated[str, typer.Option(help="name of the probe")]
License = Annotated[str, typer.Option(help="of the probe, as the hub names licences")]
HubModel = Annotated[
    str | None,
    typer.Option(
        "--base-model", help="org/name of MODEL on the hub, when it is a folder; for the card"
    ),
]
HubData = Annotated[
    list[str] | None,
    typer.Option("--dataset", help="org/name of a data set on the hub, repeatable; for the card"),
]
DataLicense = Annotated[
    list[str] | None,
    typer.Option(
        "--data-license", help='"FILE: LICENCE" of the questions, repeatable; for the card'
    ),
]
To = Annotated[
    Path | None,
    typer.Option("--to", help="new folder (default: OUT/probe)"),
]
