"""What is asked of a probe or a model outside `train`, as the command line has it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from offline.options import (
    BaseURL,
    DeviceMap,
    InFlight,
    Model,
    Revision,
    Run,
    Seed,
)
from offline.run_folder import holds_run, locked


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


@holds_run
def crossvalidate(
    out: Run,
    splits: Annotated[int, typer.Option(min=2, help="of the relations and questions")] = 5,
) -> None:
    """Fit and evaluate anew until every relation was unseen once: how good the method is."""
    from offline import crossvalidate as verb
    from offline.dataset import load_dataset
    from offline.fit_result import FitResult

    like = FitResult.load(out / "fit.json")
    data = load_dataset(out)
    found = verb.crossvalidate(data, like, out, splits=splits)
    found.save(out / verb.FILE)
    typer.echo(verb.table(found))


def push(
    folder: Annotated[Path, typer.Argument(help="folder of a probe, as `publish` writes it")],
    repository: Annotated[str, typer.Argument(help="org/name on the hub; made if it is not there")],
    private: Annotated[bool, typer.Option(help="when it has to be made")] = False,
) -> None:
    """Upload a probe to the hub; prints what `python -m server MODEL --probe ..` loads."""
    from offline import hub

    typer.echo(hub.push(folder, repository, private=private))


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
    typer.echo(verb.table(layers, top=top))
    if plot is not None:
        verb.plot(layers, plot, title=f"{loaded.identity.model_id}, {len(token_ids)} tokens")


def transfer(
    probe: Annotated[Path, typer.Argument(help="folder of the probe")],
    sibling: Annotated[str, typer.Argument(help="hub id or folder of a model of equal shape")],
    run: Annotated[Path, typer.Option(help="folder of the run that the probe is from")],
    revision: Revision = None,
    model: Annotated[
        str | None, typer.Option(help="the probe's own model: tells how far its neurons moved")
    ] = None,
    model_revision: Annotated[str | None, typer.Option(help="commit of --model")] = None,
    device_map: DeviceMap = None,
) -> None:
    """Read a sibling model with a probe: AUROC on both, and the drift of the probe's neurons."""
    from offline import transfer as verb
    from offline.models import load_model, load_tokenizer
    from probes.probe import Probe

    reader = Probe.load(probe)
    dtype = reader.card.model.dtype
    tokenizer = load_tokenizer(sibling, revision=revision)
    other = load_model(
        sibling, revision=revision, tokenizer=tokenizer, dtype=dtype, device_map=device_map
    )
    own = None
    if model is not None:
        own = load_model(
            model,
            revision=model_revision,
            tokenizer=load_tokenizer(model, revision=model_revision),
            dtype=dtype,
        )
    with locked(run):
        found = verb.transfer(reader, other, run, own=own)
    typer.echo(verb.table(found))
