"""Criteria of channels on a CIFAR ResNet: cut at once to a budget of multiply-adds, norms re-estimated, nothing trained.

The inner convolutions of all blocks are cut. Three questions: which criterion; how the slices of a unit make its score
(`combine`); which channels compete, and on which terms (`allocation`, `normalize`). Rows are kept in a JSON as they come.

    python benchmarks/unit_criteria.py rows.json [--depth 20] [--quick] [--out docs/benchmarks/unit_criteria.md]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conditions import ROOT, Rows, conditions, show, table
from resnet56 import accuracy, images
from torch import Tensor, nn

import secateur as sc
from secateur.graph import cut
from secateur.measure.macs import macs

sys.path.append(str(ROOT / "examples"))
from cifar_resnet import make

BUDGETS = {"1.5x": "66.667% MACs", "2.0x": "50% MACs"}
CRITERIA = {
    "L1": {"criterion": "magnitude"},
    "L2": {"criterion": "magnitude", "reduction": "l2"},
    "Taylor, weights": {"criterion": "taylor"},
    "OBD": {"criterion": "obd"},
    "Wanda": {"criterion": "wanda"},
    "FPGM": {"criterion": "fpgm"},
    "BatchNorm scale": {"criterion": "bn_scale"},
    "Taylor, activations": {"criterion": "taylor_activation"},
    "Taylor, gates": {"criterion": "taylor_gate"},
    "activation norm": {"criterion": "activation_norm"},
    "Wanda of units": {"criterion": "wanda_unit"},
    "random": {"criterion": "random"},
}
COMBINED = ("L1", "Taylor, weights")
RANKED = ("L1", "Taylor, weights", "Taylor, gates", "OBD")


def cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Table, name of the row, and keys of the recipe."""
    for name, keys in CRITERIA.items():
        yield "criterion", name, keys
    for name in COMBINED:
        for combine in ("sum", "mean", "max", "first"):
            yield "combine", f"{name}, {combine}", {**CRITERIA[name], "pattern": {"name": "channel", "combine": combine}}
    for name in RANKED:
        for allocation in ("global", "isomorphic"):
            for normalize in ("none", "mean", "max"):
                pattern = {"name": "channel", "normalize": normalize}
                row = f"{name}, {allocation}, {'as they are' if normalize == 'none' else 'divided by the ' + normalize}"
                yield "allocation", row, {**CRITERIA[name], "allocation": allocation, "pattern": pattern}


class Bench:
    """A trained network and its images."""

    def __init__(self, depth: int, quick: bool):
        self.model: nn.Module = make(depth).model.eval()
        count = 256 if quick else 1280
        chosen = np.random.default_rng(0).permutation(np.arange(0, 50_000, 50_000 // count)[:count])
        self.data = images("train", chosen, 128)
        self.test = images("test", range(0, 10_000, 50 if quick else 10), 250)
        self.example: Tensor = torch.zeros(1, 3, 32, 32)

    def row(self, budget: str, keys: dict[str, Any]) -> dict[str, float]:
        """Accuracy in percent after the cut, and how many times fewer multiply-adds."""
        options = {"pattern": "channel", "layers": ["layer*.conv1"], "ignore": ["conv1"], "data": self.data, **keys}
        started = time.process_time()
        plan = sc.plan(self.model, budget=budget, example=self.example, **options)
        seconds = time.process_time() - started
        smaller = cut(self.model, plan)
        sc.reestimate_norms(smaller, self.data)
        fewer = macs(self.model, self.example).dense / macs(smaller, self.example).dense
        return {"accuracy": accuracy(smaller, self.test), "fewer": fewer, "seconds": seconds}


def page(rows: dict[str, Any], depths: list[int], seconds: float) -> list[str]:
    """The tables of all rows that are known."""
    lines = [
        "# Criteria of channels",
        "",
        "Trained CIFAR ResNets, of which only the inner convolution of each block is cut, at once, to a budget of "
        "multiply-adds. No training, no repair; BatchNorm statistics re-estimated in every row. Accuracy in percent on every "
        "10th test image (1,000; the images were compressed as JPEG). Calibration on 1,280 training images of all classes. "
        "One run a row: differences of less than two points are within the sampling error of 1,000 images.",
    ]
    for depth in depths:
        for part in ("criterion", "combine", "allocation"):
            found = {n: [rows.get(f"{depth}/{b}/{part}/{n}") for b in BUDGETS] for p, n, _ in cases() if p == part}
            cells = [[n, *(f"{r['accuracy']:.1f}" for r in rs)] for n, rs in found.items() if all(rs)]
            if cells:
                dense = rows[f"{depth}/dense"]["accuracy"]
                lines += ["", f"## ResNet-{depth}, by {part} (dense: {dense:.1f})", "", *table([part, *BUDGETS], cells)]
    return [*lines, "", conditions(torch.get_num_threads(), "seed 0", seconds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON in which finished rows are kept")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 32, 44, 56))
    parser.add_argument("--part", default="", help="only this table: criterion, combine, allocation")
    parser.add_argument("--quick", action="store_true", help="few images")
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.rows)
    started = time.monotonic()
    bench = Bench(options.depth, options.quick)
    todo = [(p, n, k, b) for p, n, k in cases() if options.part in ("", p) for b in BUDGETS]
    rows.measured(f"{options.depth}/dense", lambda: {"accuracy": accuracy(bench.model, bench.test)})
    for part, name, keys, budget in todo:
        rows.measured(f"{options.depth}/{budget}/{part}/{name}", partial(bench.row, BUDGETS[budget], keys))
    depths = sorted({int(key.split("/")[0]) for key in rows if "/" in key})
    rows.keep("seconds", rows.get("seconds", 0.0) + time.monotonic() - started)
    show(page(rows, depths, rows["seconds"]), options.out)


if __name__ == "__main__":
    main()
