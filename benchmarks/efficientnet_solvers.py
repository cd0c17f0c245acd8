"""EfficientNet-Lite0 pruned at once to 50 and 70% by each solver: what least squares over calibration images saves.

Runs `secateur prune` on examples/efficientnet_lite0.py. The even images of imagenet_sample_1000.npz calibrate, the odd ones
judge; no labels are used and nothing is trained. Every row is kept in the JSON file as soon as it is known.

    python benchmarks/efficientnet_solvers.py rows.json [--solvers alps] [--allocations lamp] [--out PAGE]
"""

from __future__ import annotations

import argparse
import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

from conditions import ROOT, Rows, conditions, show, table
from efficientnet import accuracy, run

SOLVERS = ("keep", "least-squares", "sparsegpt", "admm", "alps", "alps?damp=0.1", "sparsegpt?damp=0.1")
ALLOCATIONS = ("uniform", "lamp", "global", "dynamic")
SPARSITIES = (0.5, 0.7)
NORMALISATIONS = ("imagenet", "own")


def row(normalise: str, solver: str, allocation: str, options: argparse.Namespace) -> dict[str, Any]:
    """Top-1 by sparsity, before, at once and with statistics re-estimated, in percent."""
    source = f"{ROOT / 'examples' / 'efficientnet_lite0.py'}:make?normalise={normalise}"
    more = ("--solver", solver, "--allocation", allocation)
    started = time.monotonic()
    plain = run(source, options, ["magnitude"], SPARSITIES, *more)
    seconds = (time.monotonic() - started) / len(SPARSITIES)
    norms = run(source, options, ["magnitude"], SPARSITIES, *more, "--reestimate-norms")
    return {
        "dense": accuracy(plain[0]["before"]),
        "plain": [accuracy(report["after"]) for report in plain],
        "norms": [accuracy(report["after"]) for report in norms],
        "seconds": seconds,
    }


def page(rows: dict[str, dict[str, Any]], seconds: float, threads: int) -> list[str]:
    """The tables of both normalisations."""
    lines = [
        "# EfficientNet-Lite0 on ImageNet, pruned at once by each solver",
        "",
        "4.65 million weights, single weights removed, no labels, no training. Top-1 in percent of 500 images: one more or",
        "less is 0.2 points. *norms*: BatchNorm statistics re-estimated afterwards, which by itself adapts the network to the",
        "images (efficientnet.md has the dense network's line). Seconds: the command for one sparsity, evaluation included.",
        "",
    ]
    titles = {
        "imagenet": "Images normalised by ImageNet's mean and standard deviation",
        "own": "Images normalised as in training",
    }
    for normalise, title in titles.items():
        found = {tuple(k.split("|")[1:]): v for k, v in rows.items() if k.startswith(f"{normalise}|")}
        if not found:
            continue
        dense = next(iter(found.values()))["dense"]
        head = ["solver", "allocation", *(f"{s:.0%}{w}" for s in SPARSITIES for w in ("", ", norms")), "seconds"]
        cells = []
        for (solver, allocation), at in found.items():
            figures = [f"{v:.1f} ({v - dense:+.1f})" for pair in zip(at["plain"], at["norms"], strict=True) for v in pair]
            cells.append([solver, allocation, *figures, f"{at['seconds']:.0f}"])
        lines += [f"## {title}", "", f"Dense {dense:.1f}.", "", *table(head, cells), ""]
    return [*lines, conditions(threads, "seed 0 (nothing is drawn)", seconds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON file that keeps the rows")
    parser.add_argument("--solvers", nargs="*", default=list(SOLVERS), choices=SOLVERS)
    parser.add_argument("--allocations", nargs="*", default=list(ALLOCATIONS), choices=ALLOCATIONS)
    parser.add_argument("--normalisations", nargs="*", default=list(NORMALISATIONS), choices=NORMALISATIONS)
    parser.add_argument("--quick", action="store_true", help="200 images; give another JSON file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the page there")
    options = parser.parse_args()
    started = time.monotonic()
    rows = Rows(options.rows)
    for names in itertools.product(options.normalisations, options.solvers, options.allocations):
        rows.measured("|".join(names), partial(row, *names, options))
    show(page(rows, time.monotonic() - started, options.threads), options.out)


if __name__ == "__main__":
    main()
