"""Budgets in parameters, MACs, bytes and milliseconds on real networks: promised, achieved, and how long the search took.

ResNet-56, EfficientNet-Lite0, ResNet-18 and ResNet-50 lose channels, all-MiniLM-L6-v2 heads and feed-forward neurons, by L1;
ResNet-56 and MiniLM whole blocks as well.
Each finished row is kept in ROWS, and a later run goes on from there. Writes docs/benchmarks/budgets.md.

    python benchmarks/budgets.py [ROWS] [--models resnet18 ...] [--units params ...] [--accuracy] [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conditions import ROOT, Rows, conditions, keep, table
from torch import nn

import secateur as sc
from secateur.budgets.amount import UNITS
from secateur.budgets.choose import choose_counts
from secateur.errors import BudgetError
from secateur.graph import choose_groups, cut, lowest, make_plan, trace, unit_scores
from secateur.measure.latency import compare_latency
from secateur.measure.macs import macs
from secateur.measure.sizes import sizes
from secateur.models import load_model
from secateur.models.torchvision_shim import prepare_torchvision
from secateur.types import Plan

SHARES = (75, 50, 35)
ALLOCATIONS = ("uniform", "isomorphic", "global", "gain")
EXAMPLES = ROOT / "examples"


def torchvision(name: str) -> tuple[nn.Module, Any, tuple[str, ...]]:
    """Random weights: what a network costs does not depend on them."""
    prepare_torchvision()
    from torchvision import models

    torch.manual_seed(0)
    return models.get_model(name, weights=None), torch.zeros(1, 3, 224, 224), ("channel", "neuron")


def resnet56() -> tuple[nn.Module, Any, tuple[str, ...]]:
    """Trained on CIFAR-10."""
    sys.path.append(str(EXAMPLES))
    from cifar_resnet import make

    return make(56).model, torch.zeros(8, 3, 32, 32), ("channel", "neuron")


def efficientnet() -> tuple[nn.Module, Any, tuple[str, ...]]:
    """Trained on ImageNet."""
    return load_model(f"{EXAMPLES / 'efficientnet_lite0.py'}:make").model, torch.zeros(1, 3, 224, 224), ("channel", "neuron")


def minilm() -> tuple[nn.Module, Any, tuple[str, ...]]:
    """Trained; 128 tokens."""
    model = load_model(f"{EXAMPLES / 'minilm.py'}:make").model
    tokens = torch.randint(1000, 20000, (1, 128), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, ("head", "neuron")


MODELS: dict[str, tuple[str, Callable[[], tuple[nn.Module, Any, tuple[str, ...]]]]] = {
    "resnet56": ("ResNet-56, CIFAR-10, batch 8", resnet56),
    "efficientnet": ("EfficientNet-Lite0, 224, batch 1", efficientnet),
    "resnet18": ("ResNet-18, 224, batch 1", lambda: torchvision("resnet18")),
    "resnet50": ("ResNet-50, 224, batch 1", lambda: torchvision("resnet50")),
    "minilm": ("MiniLM, 128 tokens, heads and neurons", minilm),
    "resnet56_blocks": ("ResNet-56, batch 8, whole blocks", lambda: (*resnet56()[:2], ("layer",))),
    "minilm_blocks": ("MiniLM, 128 tokens, whole blocks", lambda: (*minilm()[:2], ("layer",))),
}


def found(model: nn.Module, dense: nn.Module, example: Any, unit: str, reference: float) -> float:
    """What the cut model is measured to cost; of milliseconds by a second, longer timing beside the dense model."""
    if unit == "ms":
        return reference / compare_latency({"dense": dense, "cut": model}, example, seconds=2.0)["cut"].speedup
    if unit == "MACs":
        return macs(model, example).dense
    return getattr(sizes(model), {"params": "parameters", "bytes": "bytes_memory"}[unit])


def of_units(model: nn.Module, example: Any, kinds: tuple[str, ...], target: str) -> tuple[Plan, float]:
    """The plan of a budget, and the seconds of the search, from the traced graph on."""
    graph = trace(model, example)
    groups = choose_groups(graph, kinds)
    scores = unit_scores(model, groups, "l1")
    started = time.perf_counter()
    kept, budget = choose_counts(model, graph, groups, scores, target=target, scope="local", example=example)
    searched = time.perf_counter() - started
    return replace(make_plan(graph, model, lowest(groups, scores, kept)), budget=budget), searched


def of_blocks(model: nn.Module, example: Any, target: str) -> tuple[Plan, float]:
    """The same of whole blocks; the tracing is in the seconds."""
    started = time.perf_counter()
    found = sc.plan(model, pattern="layer", budget=target, example=example)
    return found, time.perf_counter() - started


def row(name: str, unit: str, share: int) -> dict[str, Any]:
    """One budget on one model."""
    model, example, kinds = MODELS[name][1]()
    model.eval()
    target, started = f"{share}% {unit}", time.perf_counter()
    try:
        plan, searched = of_blocks(model, example, target) if kinds == ("layer",) else of_units(model, example, kinds, target)
    except BudgetError as error:
        return {"refused": str(error), "search_s": time.perf_counter() - started}
    budget = plan.budget
    assert budget is not None
    again = found(cut(model, plan), model, example, unit, budget.dense)
    return {
        "dense": budget.dense, "limit": budget.limit, "promised": budget.promised, "achieved": budget.achieved,
        "low": budget.low, "high": budget.high, "found": again, "search_s": searched, "load": os.getloadavg()[0],
    }  # fmt: skip


def cells(name: str, unit: str, share: int, done: dict[str, Any]) -> list[str]:
    """The row as the page shows it."""
    first = [MODELS[name][0], f"{share}% {unit}"]
    if "refused" in done:
        return [*first, "", "", done["refused"], "", f"{done['search_s']:.1f}"]
    number = "{:.2f}" if unit == "ms" else "{:,.0f}"
    spread = f" ({done['low']:.2f} to {done['high']:.2f})" if unit == "ms" else ""
    achieved = done["achieved"] if unit == "ms" else done["found"]
    later = f"{done['found'] / done['limit']:.1%}" if unit == "ms" else ""
    limit, promised, real = (number.format(x) for x in (done["limit"], done["promised"], achieved))
    used = f"{achieved / done['limit']:.2%}"
    return [*first, limit, promised, f"{real}{spread}", used, later, f"{done['search_s']:.1f}"]


def accuracy(share: int, allocation: str) -> dict[str, Any]:
    """ResNet-56 cut to a share of its MACs, judged on 1,000 test images."""
    import numpy as np
    from resnet56 import accuracy as judged
    from resnet56 import images

    model, example, _ = resnet56()
    train = np.random.default_rng(0).permutation(np.arange(0, 50_000, 39))[:1280]
    keys = {"pattern": "channel", "budget": f"{share}% MACs", "allocation": allocation, "reestimate_norms": True}
    if share < 100:
        model = sc.prune(model, example=example, data=images("train", train, 128), **keys).model
    return {"accuracy": judged(model, images("test", range(0, 10_000, 10), 250))}


def _accuracies(rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    lines = []
    for share in (100, *SHARES):
        line = [rows.get(f"accuracy {share} {a}") for a in ALLOCATIONS]
        if any(line):
            lines.append([f"{share}%", *("" if cell is None else f"{cell['accuracy']:.1f}" for cell in line)])
    return lines


def page(rows: dict[str, dict[str, Any]], options: argparse.Namespace, seconds: float) -> list[str]:
    """All rows that are there, in the order of the models."""
    lines = []
    for name in MODELS:
        for unit in UNITS:
            for share in SHARES:
                if (done := rows.get(f"{name} {unit} {share}")) is not None:
                    lines.append(cells(name, unit, share, done))
    head = ["network", "budget", "at most", "promised", "achieved", "of the budget", "timed again", "search, s"]
    return [
        "# Budgets kept",
        "",
        "Units go by L1 (mean over all coupled slices): for parameters, MACs and bytes by one ratio for all groups, for "
        "milliseconds by the score lost for each saved (allocation `gain`), as `sc.prune` does by default. Promised is what "
        "the search says of the cut model; achieved is what was measured of it: parameters, MACs and bytes counted on the "
        "really cut model, milliseconds the median (and quartiles) that ended the search. Timed again: a second timing of 2 s "
        "after the search, beside the dense model, as a share of the budget: how far it is from the figure before is the "
        "machine's noise. The search goes from the traced graph to the chosen units; of milliseconds it holds the table of "
        "operations and all timings of cut models. Of whole blocks those go that together have the smallest mean weights.",
        "",
        *table(head, lines),
        "",
        "## By which order units go",
        "",
        "ResNet-56 on every 10th test image of CIFAR-10 (1,000 of all classes), all channels cut at once by L1 to the share of "
        "the MACs, without training; BatchNorm statistics re-estimated on 1,280 training images. Accuracy in percent.",
        "",
        *table(["MACs", *ALLOCATIONS], _accuracies(rows)),
        "",
        conditions(options.threads, "seed 0", seconds),
        "Milliseconds were taken at a load of " + _loads(rows) + " on these cores, row by row, in runs of their own.",
    ]


def _loads(rows: dict[str, dict[str, Any]]) -> str:
    """How busy the machine was: processes that wanted a core, averaged over a minute."""
    loads = sorted(done["load"] for key, done in rows.items() if " ms " in key and "load" in done)
    return f"{loads[0]:.0f} to {loads[-1]:.0f}" if loads else "?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", type=Path, help="JSON file that keeps finished rows")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS))
    parser.add_argument("--accuracy", action="store_true", help="only the accuracies of ResNet-56 by allocation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="50%% only, printed and not kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    rows = Rows(options.rows)
    wanted: dict[str, Callable[[], dict[str, Any]]] = {}
    for share in (50,) if options.quick else SHARES:
        for name, unit in itertools.product(() if options.accuracy else options.models, options.units):
            wanted[f"{name} {unit} {share}"] = partial(row, name, unit, share)
        for allocation in ALLOCATIONS if options.accuracy else ():
            wanted[f"accuracy {share} {allocation}"] = partial(accuracy, share, allocation)
    if options.accuracy:
        wanted["accuracy 100 uniform"] = partial(accuracy, 100, "uniform")
    for key, make in wanted.items():
        rows.measured(key, make)
    keep("budgets.md", page(rows, options, time.monotonic() - started), quick=options.quick)


if __name__ == "__main__":
    main()
