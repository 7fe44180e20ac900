"""The verbs from features to a probe and its report, as the command line has them.

Libraries are imported where they are needed: `--help` must not wait for torch.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from offline.options import (
    C,
    DataLicense,
    DesignName,
    DeviceMap,
    HubData,
    HubModel,
    License,
    MaxNeurons,
    Model,
    ModelDtype,
    Name,
    Paper,
    Revision,
    Run,
    Solver,
    To,
)
from offline.run_folder import holds_run


@holds_run
def fit(
    out: Run,
    solver: Solver = None,
    max_neurons: MaxNeurons = None,
    paper: Paper = False,
    design: DesignName = None,
    c: C = None,
) -> None:
    """Fit, choose and calibrate a probe."""
    from offline import fit as verb
    from offline.dataset import load_dataset
    from offline.fit_result import fit_settings

    data = load_dataset(out)
    settings = fit_settings(
        design or ("3-vs-1" if paper else "tokens"),
        seed=data.split.seed,
        solver=solver,
        max_neurons=max_neurons,
        c=c,
    )
    verb.fit(data, settings).save(out / "fit.json")


@holds_run
def evaluate(out: Run) -> None:
    """Judge the probe on unseen relations and questions, beside the baselines."""
    from offline import evaluate as verb
    from offline.best_of import load_samples
    from offline.dataset import load_dataset
    from offline.fit_result import FitResult
    from offline.given_rows import load_given

    result = FitResult.load(out / "fit.json")
    data = load_dataset(out)
    given = load_given(out, like=data.features.header)
    samples = load_samples(out, data)
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
    base_model: HubModel = None,
    dataset: HubData = None,
    data_license: DataLicense = None,
    to: To = None,
) -> None:
    """Write the folder that `python -m server MODEL --probe FOLDER` loads."""
    from offline import publish as verb
    from offline.dataset import load_dataset
    from offline.evaluate import Evaluation
    from offline.fit_result import FitResult
    from offline.models import load_model, load_tokenizer

    result = FitResult.load(out / "fit.json")
    data = load_dataset(out)
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
        training={
            "command": command_line(),
            "license": license,
            "base_model": base_model or "",
            "datasets": ", ".join(dataset or ()),
            "licences of the data": "; ".join(data_license or ()),
            **verb.training_facts(out, result, data),
        },
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
    data = load_dataset(out)
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
