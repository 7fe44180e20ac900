"""How long a path of sparse fits takes, beside liblinear, and what it needs at an 8B model's width.

    python benchmarks/fit.py [--run RUN] [--rows 3000]     46,080 columns, both solvers
    python benchmarks/fit.py --wide                        458,752 columns x 3,000 rows, ours alone

Both solve the same strengths on the same standardised features and are judged by the AUROC on as
many rows again, of answers that were not fitted on; liblinear once as `fit` may use it, where the
intercept is as good as free, once as scikit-learn ships it. Seconds are of this process' CPU time,
which a busy machine does not stretch, and of the clock. With `--run` these are the features of a
finished `extract` (tokens of wrong claims against all other judged tokens), else made up: columns
that share 40 hidden factors, log-normal as CETT is, 60 of them with an effect. skglm compiles
itself once per process; that is measured apart. The last line is one JSON object.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from sklearn.linear_model import LogisticRegression

from offline.features import FloatArray, load_features
from offline.l1_path import Point, l1_path, standardise
from offline.metrics import Bools, rank
from offline.shards import Kind

STRENGTHS = (0.3, 0.2, 0.14, 0.1, 0.085, 0.07, 0.06, 0.05)
COLUMNS, WIDE_COLUMNS, WIDE_ROWS = 46_080, 458_752, 3_000
FACTORS, EFFECTS = 40, 60
JUDGED = (Kind.WRONG, Kind.RIGHT, Kind.SCAFFOLD, Kind.PROSE)


class Data(NamedTuple):
    x: FloatArray  # [rows, columns] standardised by the rows that are fitted on
    positive: Bools
    held_out_x: FloatArray
    held_out: Bools


def made_up(rows: int, columns: int) -> tuple[FloatArray, Bools]:
    """Block by block: nothing but the matrix itself takes memory."""
    random = np.random.default_rng(0)
    factors = random.standard_normal((rows, FACTORS), dtype=np.float32)
    effects = dict(
        zip(
            random.choice(columns, EFFECTS, replace=False),
            random.standard_normal(EFFECTS),
            strict=True,
        )
    )
    x = np.empty((rows, columns), np.float32, order="F")
    logit = 2.0 * random.logistic(size=rows)
    for start in range(0, columns, 1024):
        block = x[:, start : start + 1024]
        loadings = random.standard_normal((FACTORS, block.shape[1]), dtype=np.float32)
        block[:] = random.standard_normal(block.shape, dtype=np.float32)
        block += factors @ (0.1 * loadings)
        for column in effects.keys() & range(start, start + block.shape[1]):
            logit += effects[column] * block[:, column - start]
        np.exp(0.5 * block, out=block)
    return x, logit > 1.0


def read_run(run: Path, rows: int) -> tuple[FloatArray, Bools]:
    """The first `rows` judged tokens of answers in an order of their own; whole answers apart from
    the last."""
    features = load_features(run / "features")
    order = np.random.default_rng(0).permutation(len(features.ids))[features.answer]
    judged = np.flatnonzero(np.isin(features.kind, JUDGED))
    chosen = judged[np.argsort(order[judged], kind="stable")][:rows]
    return features.cett(chosen), features.kind[chosen] == Kind.WRONG


def load(run: Path | None, rows: int) -> Data:
    x, positive = read_run(run, 2 * rows) if run else made_up(2 * rows, COLUMNS)
    half = len(x) // 2
    fitted, held_out = np.asfortranarray(x[:half]), x[half:]
    mean, scale = standardise(fitted)
    held_out -= mean
    held_out /= scale
    return Data(fitted, positive[:half], held_out, positive[half:])


def shipped_liblinear(data: Data) -> Iterator[Point]:
    """The same strengths with scikit-learn's defaults, as the paper's code fits."""
    y = data.positive
    largest = float(np.abs(data.x.T @ (y - y.mean()).astype(np.float32)).max())
    for strength in STRENGTHS:
        model = LogisticRegression(
            l1_ratio=1.0,
            solver="liblinear",
            max_iter=1000,
            random_state=0,
            C=1 / (strength * largest),
        ).fit(data.x, y)
        yield Point(strength, np.ravel(model.coef_), float(model.intercept_[0]))


CONTESTANTS: dict[str, Callable[[Data], Iterator[Point]]] = {
    "skglm": lambda data: l1_path(data.x, data.positive, STRENGTHS),
    "liblinear": lambda data: l1_path(data.x, data.positive, STRENGTHS, solver="liblinear"),
    "liblinear, defaults": shipped_liblinear,
}


def run_path(data: Data, contestant: str) -> tuple[float, float, list[dict[str, float]]]:
    """CPU seconds and seconds of the whole path, and each strength's neurons and AUROC."""
    started, cpu = time.perf_counter(), time.process_time()
    points = list(CONTESTANTS[contestant](data))
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - started
    found = []
    for point in points:
        columns = np.flatnonzero(point.weight)
        logit = data.held_out_x[:, columns] @ point.weight[columns]
        auroc = rank(data.held_out, logit)
        found.append({"strength": point.strength, "neurons": len(columns), "auroc": auroc})
    return cpu, seconds, found


def compile_solver() -> float:
    """CPU seconds that skglm needs before its first fit in a process."""
    started = time.process_time()
    x = np.asfortranarray(np.random.default_rng(0).standard_normal((200, 20)).astype(np.float32))
    list(l1_path(x, x[:, :5].sum(axis=1) > 0, (0.2,)))
    return time.process_time() - started


def compare(run: Path | None, rows: int) -> dict[str, object]:
    data = load(run, rows)
    compiling = compile_solver()
    print(f"{data.x.shape[0]} x {data.x.shape[1]}, {data.positive.mean():.0%} positive")
    results: dict[str, object] = {"rows": data.x.shape[0], "columns": data.x.shape[1]}
    used = {}
    for name in CONTESTANTS:
        used[name], seconds, found = run_path(data, name)
        results[f"path of {name}"] = {"cpu_s": used[name], "seconds": seconds, "points": found}
        print(f"{name}: {used[name]:.1f} CPU s ({seconds:.1f} s), {len(STRENGTHS)} strengths")
        for point in found:
            print("  {strength:<6}{neurons:>6} neurons   AUROC {auroc:.4f}".format(**point))
        gain, all_in = used[name] / used["skglm"], used[name] / (used["skglm"] + compiling)
        results[f"gain over {name}"] = gain
        print(f"  {gain:.1f} times skglm; {all_in:.1f} with its compiling", flush=True)
    return results | {"compiling_cpu_s": compiling}


def fit_wide() -> dict[str, object]:
    x, positive = made_up(WIDE_ROWS, WIDE_COLUMNS)
    compiling = compile_solver()
    started = time.perf_counter()
    standardise(x)
    neurons = []
    for point in l1_path(x, positive, STRENGTHS):
        neurons.append(int((point.weight != 0).sum()))
        print(
            f"  {point.strength:<6}{neurons[-1]:>6} neurons {time.perf_counter() - started:8.1f} s"
        )
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{WIDE_ROWS} x {WIDE_COLUMNS}: {seconds:.1f} s, peak {peak:.1f} GiB, matrix included")
    return {
        "rows": WIDE_ROWS,
        "columns": WIDE_COLUMNS,
        "seconds": seconds,
        "compiling_cpu_s": compiling,
        "neurons": neurons,
        "peak_gib": peak,
    }


def main(
    run: Annotated[Path | None, typer.Option(help="run folder with features")] = None,
    rows: Annotated[int, typer.Option(min=100, help="to fit on")] = 3000,
    wide: Annotated[bool, typer.Option("--wide", help="the width of an 8B model")] = False,
) -> None:
    """Print seconds, neurons and AUROC, or seconds and peak memory."""
    results = fit_wide() if wide else compare(run, rows)
    result = {
        "benchmark": "fit",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "features": "run" if run else "made up",
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "skglm": importlib.metadata.version("skglm"),
        "scikit-learn": importlib.metadata.version("scikit-learn"),
        **results,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
