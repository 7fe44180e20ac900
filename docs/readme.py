"""Writes what the README takes from elsewhere: the tree from the files' first sentences, the
figures from the shipped probe's card. `make fix` runs it; a test fails when it has something to do.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "probes" / "fitted" / "smollm2-135m-instruct" / "probe.json"
# Datasets and metrics of the card; below, the probe, what is free, and its dense rival.
ANSWERS = (
    "answers, wikidata_completions, complete, unseen, as asked",
    "answers, wikidata_completions, complete, unseen, balanced inside groups",
    "answers, unseen relations and questions, as asked",
)
TOKENS = (
    "tokens, wrong claims against all others",
    "tokens, wrong against right claims",
    "tokens, wrong claims against ordinary long answers",
)
# Columns of the table: the best of these detectors on each data set stands for its kind.
DETECTORS = {
    "the probe": ("probe",),
    "best log-probability or entropy": (
        "-logprob", "-logprob_mean", "-logprob_min", "-logprob_sum",
        "entropy", "entropy_mean", "entropy_max",
    ),
    "as many random neurons": ("random neurons, as many",),
    "best dense residual layer": tuple(f"residual layer {n}, dense" for n in range(1, 100)),
    "all neurons, dense": ("CETT of all neurons, dense",),
}  # fmt: skip


def render(text: str) -> str:
    """The README with its generated parts made anew."""
    for name, part in (("tree", tree()), ("figures", figures())):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        text = head + begin + part + end + rest.partition(end)[2]
    return text


def tree() -> str:
    """Every committed module of the three packages with its first sentence."""
    command = ["git", "ls-files", "probes", "server", "offline"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in listing.stdout.splitlines()]
    modules = [p for p in paths if p.suffix == ".py" and p.name != "__init__.py" and p.exists()]
    lines = []
    for folder in sorted({path.parent for path in modules}):
        lines.append(f"{folder.relative_to(ROOT)}/")
        for path in sorted(path for path in modules if path.parent == folder):
            document = ast.get_docstring(ast.parse(path.read_text())) or ""
            first = " ".join(document.partition("\n\n")[0].split())
            lines.append(f"  {path.name:<20} {first}")
    return "```text\n" + "\n".join(lines) + "\n```\n"


def figures() -> str:
    """AUROC of the shipped probe beside its rivals, and what its default threshold flags."""
    card = json.loads(CARD.read_text())["card"]
    rows = {(row["dataset"], row["detector"], row["metric"]): row for row in card["evaluation"]}
    lines = [
        "| AUROC on the test split | " + " | ".join(DETECTORS) + " | n |",
        "|---" * (len(DETECTORS) + 2) + "|",
    ]
    for dataset in (*ANSWERS, *TOKENS):
        kinds = [
            [rows[dataset, name, "auroc"] for name in names if (dataset, name, "auroc") in rows]
            for names in DETECTORS.values()
        ]
        best = [max(kind, key=lambda row: row["value"]) if kind else None for kind in kinds]
        cells = " | ".join(_interval(row) if row else "-" for row in best)
        lines.append(f"| {dataset} | {cells} | {rows[dataset, 'probe', 'auroc']['n']} |")
    point = next(
        p for p in card["token"]["operating_points"] if p["name"] == card["token"]["default"]
    )
    flagged = f"flagged_at_{point['name']}"
    prose = rows["tokens of ordinary long answers", "probe", flagged]
    wrong = rows["tokens of wrong claims", "probe", flagged]
    right = rows["tokens of right claims", "probe", flagged]
    spans = rows[f"flagged spans, {point['name']}", "probe", "hold_a_wrong_claim"]
    judged = {"token": "token risk", "span": spans["dataset"], "response": "response risk"}
    ece = {level: rows[name, "probe", "ece"]["value"] for level, name in judged.items()}
    return "\n".join(
        [
            *lines,
            "",
            f"At the default threshold of tokens ({point['threshold']:.2f}, `{point['name']}`) "
            f"{prose['value']:.1%} of the tokens of ordinary long answers are flagged, "
            f"{wrong['value']:.0%} of the tokens of wrong claims and {right['value']:.0%} of those "
            f"of right claims. Of the spans that touch judged text {spans['value']:.0%} hold a "
            "wrong claim (short answers, at most three wrong to two right, and as much prose of "
            f"all kinds). Calibration error (ECE): {ece['token']:.3f} for tokens, "
            f"{ece['span']:.3f} for spans, {ece['response']:.3f} for responses.",
            "",
        ]
    )


def _interval(row: dict[str, float]) -> str:
    value, low, high = (re.sub("^0", "", f"{row[key]:.3f}") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
