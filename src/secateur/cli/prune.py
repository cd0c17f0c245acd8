"""``secateur prune``: the main job. One recipe, or several sparsities and criteria side by side."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cli import options as o
from secateur.cli.console import err, out, print_json, progress_bars
from secateur.cli.scan import CACHE as SCAN_CACHE
from secateur.cli.scan import SPARSITIES as SCANNED
from secateur.errors import DataError, RecipeError

if TYPE_CHECKING:
    from secateur.cli.sources import Inputs
    from secateur.recipe import Recipe

NEEDS_ARGUMENTS = True


def command(
    model: o.Model,
    recipe: o.RecipeFile = None,
    sparsity: o.Sparsity = None,
    budget: o.Budget = None,
    criterion: o.Criteria = None,
    pattern: o.Pattern = None,
    allocation: o.Allocation = None,
    reduction: o.Reduction = None,
    schedule: o.Schedule = None,
    steps: o.Steps = None,
    layers: o.Layers = None,
    ignore: o.Ignore = None,
    force: o.Force = None,
    seed: o.Seed = None,
    solver: o.Solver = None,
    repair: o.Repair = None,
    reestimate_norms: o.ReestimateNorms = False,
    slimming: o.SlimmingEpochs = None,
    slimming_strength: o.SlimmingStrength = None,
    finetune: o.FineTuneEpochs = None,
    lr: o.LearningRate = None,
    optimizer: o.Optimizer = None,
    compress: o.Compress = None,
    data: o.Data = None,
    train: o.Train = None,
    test: o.Test = None,
    evaluate: o.Evaluate = None,
    batch_size: o.BatchSize = 32,
    limit: o.Limit = None,
    scan: o.Scan = False,
    stream: o.Stream = False,
    to: o.Out = None,
    overwrite: o.Overwrite = False,
    threads: o.Threads = None,
    json: o.Json = False,
) -> None:
    """Prune a model, repair it, measure it before and after, and write weights, recipe and report.

    Example: secateur prune timm:resnet18?pretrained=true --sparsity 0.5,0.7 --data folder:calibration --test folder:validation
    --reestimate-norms --out runs/first
    """
    from secateur.cli.recipes import listed, numbers, piece, recipe_of
    from secateur.cli.sources import load_inputs

    common = recipe_of(
        recipe, pattern=pattern, allocation=allocation, reduction=reduction, schedule=schedule, steps=steps, layers=layers,
        ignore=ignore, force=force, seed=seed, solver=solver, repair=repair, reestimate_norms=reestimate_norms,
        slimming=slimming, slimming_strength=slimming_strength, finetune=finetune, lr=lr,
        optimizer=optimizer, compress=compress,
    )  # fmt: skip
    criteria = [piece(c) for c in listed(criterion)]
    recipes = variants(common, numbers(sparsity, "--sparsity"), criteria, listed(budget))
    if stream:
        with progress_bars(json):
            report = streamed(model, recipes, data, to, overwrite, threads)
        show([report], None, json)
        return
    if to is None and not json:
        err.print("[dim]nothing will be written: give --out DIR to keep the pruned model and its report[/dim]")
    with progress_bars(json):
        inputs = load_inputs(
            model, data=data, train=train, test=test, evaluate=evaluate, batch_size=batch_size, limit=limit, threads=threads
        )
        reports = run(inputs, recipes, to, overwrite, sensitivity(inputs, recipes[0]) if scan or needs_scan(recipes[0]) else ())
    show(reports, to, json)


def streamed(model: str, recipes: list[Recipe], data: str | None, to: Path | None, overwrite: bool, threads: int | None) -> Any:
    """The report of a checkpoint directory pruned a block at a time."""
    import torch

    import secateur as sc

    if not model.startswith("hf:") or to is None or len(recipes) > 1:
        raise RecipeError("--stream prunes one hf:DIR by one recipe into --out DIR")
    if threads is not None:
        torch.set_num_threads(threads)
    return sc.prune_checkpoint(model.removeprefix("hf:"), recipes[0], data=data, out=to, overwrite=overwrite)


def variants(common: Recipe, sparsities: list[float], criteria: list[Any], budgets: list[str]) -> list[Recipe]:
    """The recipe at every combination of the sparsities or budgets and criteria that were given."""
    from secateur.recipe import Recipe

    choices = itertools.product(criteria or [None], sparsities or [None], budgets or [None])  # type: ignore[list-item]
    return [Recipe.make(common, criterion=c, sparsity=s, budget=b) for c, s, b in choices]


def needs_scan(recipe: Recipe) -> bool:
    """Whether the recipe goes by sensitivity curves."""
    from secateur.registry import name_of

    return recipe.allocation is not None and name_of(recipe.allocation) == "sensitivity"


def sensitivity(inputs: Inputs, recipe: Recipe) -> Any:
    """How much each layer bears of the recipe's criterion and pattern, for the report."""
    import secateur as sc
    from secateur.cli.recipes import scanned

    if inputs.evaluate is None:
        raise DataError("--scan measures quality: give --test (batches with labels) or --evaluate (your own measure)")
    return sc.scan(
        inputs.loaded.model, evaluate=inputs.evaluate, data=inputs.data, criterion=recipe.criterion, pattern=recipe.pattern,
        sparsities=scanned(recipe.pattern, SCANNED), reduction=recipe.reduction, layers=recipe.layers,
        ignore=recipe.ignore, example=inputs.example, seed=recipe.seed, cache=SCAN_CACHE,
    )  # fmt: skip


def run(inputs: Inputs, recipes: list[Recipe], to: Path | None, overwrite: bool, curves: Any) -> list[Any]:
    """Carry out the recipes one after another; the dense model is measured once. Several are written below `to`."""
    import secateur as sc

    folders = [to] if len(recipes) == 1 else [to / folder_name(r) if to else None for r in recipes]
    if len(set(folders)) < len([f for f in folders if f]):
        raise RecipeError("two of the recipes are the same: give each sparsity, budget and criterion once")
    before, reports = None, []
    for recipe, folder in zip(recipes, folders, strict=True):
        result = sc.prune(
            inputs.loaded.model, recipe, data=inputs.data, train=inputs.train, evaluate=inputs.evaluate, example=inputs.example,
            out=folder, overwrite=overwrite, source=inputs.loaded.source, before=before, sensitivity=curves,
        )  # fmt: skip
        before = result.report.before
        reports.append(result.report)
    return reports


def folder_name(recipe: Recipe) -> str:
    """``magnitude-50``, ``magnitude-50-MACs``: what tells the runs of one comparison apart."""
    from secateur.registry import name_of

    name = name_of(recipe.criterion)
    if recipe.budget is not None:
        return f"{name}-{re.sub(r'[^A-Za-z0-9.]+', '-', recipe.budget)}"
    return name if recipe.sparsity is None else f"{name}-{100 * recipe.sparsity:g}"


def show(reports: list[Any], to: Path | None, json: bool) -> None:
    """The table, the page that compares where there are several, and what to type next."""
    from secateur.cli.report import write_page
    from secateur.report.html import render_comparison
    from secateur.report.terminal import before_after, comparison

    several = len(reports) > 1
    page = None if to is None else to / "report.html"
    if page and several:
        write_page(page, render_comparison(reports))
    if json:
        print_json(reports if several else reports[0])
        return
    out.print(comparison(reports) if several else before_after(reports[0]))
    for note in dict.fromkeys(n for r in reports for n in r.notes):
        err.print(f"note: {note}", markup=False)
    if page:
        out.print(f"report: {page}", soft_wrap=True)
        if not several:
            out.print(f"next:   secateur inspect {to}", soft_wrap=True)
