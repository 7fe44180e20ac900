"""The command line: verbs run alone, `train` says all that they can, errors are sentences."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from offline import __main__ as command
from offline.l1_path import parse_solver
from offline.questions import Source
from offline.records import RecordError
from offline.shards import parse_dtype, parse_position
from probes.errors import HNeuronsError

VERBS = (
    command.collect,
    command.label,
    command.extract,
    command.resample,
    command.fit,
    command.evaluate,
    command.publish,
    command.report,
)


@pytest.mark.parametrize("verb", VERBS)
def test_train_has_every_option_of_every_verb_with_the_same_default(
    verb: Callable[..., None],
) -> None:
    """Trap 11: a setting that one path has and the other has not is a second pipeline. Only who
    shares the work of `extract` is no matter of the whole."""
    whole = inspect.signature(command.train).parameters
    for name, parameter in inspect.signature(verb).parameters.items():
        if name == "part":
            continue
        assert whole[name].default == parameter.default


def documented(repository: Path) -> list[str]:
    """Commands of this package in the fenced blocks of every page."""
    pages = [repository / "README.md", *sorted((repository / "docs").rglob("*.md"))]
    blocks = [
        block
        for page in pages
        for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    lines = "\n".join(blocks).replace("\\\n", " ").split("\n")
    return [line for line in lines if "python -m offline " in line]


def test_every_command_of_the_documentation_is_understood(repository: Path) -> None:
    """Trap 19: the README that this work starts from names flags that its scripts do not have."""
    group = typer.main.get_command(command.app)
    assert isinstance(group, TyperGroup)
    lines = documented(repository)
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line.partition("python -m offline ")[2])
        with group.make_context("offline", words) as context:
            name, verb, rest = group.resolve_command(context, words)
            assert verb is not None
            verb.make_context(name, rest)  # or it says what it does not understand


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--paper", "--max-neurons", "50"], "--max-neurons is not of --design 3-vs-1"),
        (["--c", "2"], "--c is of the paper's designs"),
        (["--judge-url", "http://localhost:1"], "--judge-url is asked by"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_anything_is_asked(
    tmp_path: Path, options: list[str], message: str
) -> None:
    """`fit` comes hours after `collect`."""
    words = ["train", str(tmp_path / "no-model"), "--out", str(tmp_path / "run"), "--name", "x"]
    result = CliRunner().invoke(command.app, [*words, "--questions", "no-file.jsonl", *options])
    assert isinstance(result.exception, RecordError)
    assert message in str(result.exception)


def test_the_last_line_of_train_says_how_the_model_was_loaded() -> None:
    """A server that loads it otherwise refuses the probe."""
    given = {"model_dtype": "auto", "revision": None}
    assert command._as_loaded(given) == ""
    given = {"model_dtype": "float32", "revision": "my branch"}
    assert command._as_loaded(given) == " --dtype float32 --revision 'my branch'"


@pytest.mark.parametrize("verb", [verb.__name__ for verb in (*VERBS, command.sweep, command.train)])
def test_every_verb_explains_itself(verb: str) -> None:
    result = CliRunner().invoke(command.app, [verb, "--help"])
    assert result.exit_code == 0
    assert "--out" in result.output


def test_a_mistake_is_one_sentence_and_a_failing_exit(tmp_path: Path) -> None:
    """A traceback tells a newcomer nothing; exit status 0 would tell a script a lie."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "offline", "collect", "m", "--out", str(tmp_path)),
            *("--questions", f"{tmp_path}/none.jsonl:guess"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "'guess' is not one of" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (parse_position, "write", "after"),
        (parse_dtype, "float32", "int8"),
        (parse_solver, "skglm", "saga"),
    ],
)
def test_a_choice_is_checked_by_name(parse: Callable[[str], object], good: str, bad: str) -> None:
    assert str(parse(good)).endswith(good)
    with pytest.raises(RecordError, match=bad):
        parse(bad)


def test_a_missing_question_file_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        command.app,
        ["collect", "m", "--out", str(tmp_path), "--questions", f"{tmp_path}/none.jsonl:ask"],
    )
    assert result.exit_code == 1
    assert isinstance(result.exception, RecordError)
    assert "none.jsonl" in str(result.exception)


def test_a_verb_without_its_input_says_what_is_missing(tmp_path: Path) -> None:
    for arguments, word in (
        (["fit", "--out", str(tmp_path)], "features"),
        (["evaluate", "--out", str(tmp_path)], "fit.json"),
        (["label", str(tmp_path / "model"), "--out", str(tmp_path)], "model"),
    ):
        result = CliRunner().invoke(command.app, arguments)
        assert isinstance(result.exception, HNeuronsError), arguments
        assert word in str(result.exception)


def test_the_command_of_make_probe_is_understood(repository: Path) -> None:
    """Trap 19: the reference's README names a flag that its code does not have."""
    plan = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "probe"],  # a level below `make test`
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    words = shlex.split(plan[plan.index("-m offline") :].replace("\\\n", " "))[2:]
    verb = typer.main.get_command(command.app).commands[words[0]]  # type: ignore[attr-defined]
    with verb.make_context(words[0], words[1:]) as context:
        sources = [Source.parse(text) for text in context.params["questions"]]
    assert len(sources) >= 5
