"""``secateur plan``: what a recipe would do to a model, without doing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.cli import options as o
from secateur.cli.console import err, out, print_json, progress_bars

NEEDS_ARGUMENTS = True


def command(
    model: o.Model,
    recipe: o.RecipeFile = None,
    sparsity: o.OneSparsity = None,
    criterion: o.OneCriterion = None,
    pattern: o.Pattern = None,
    allocation: o.Allocation = None,
    reduction: o.Reduction = None,
    layers: o.Layers = None,
    ignore: o.Ignore = None,
    seed: o.Seed = None,
    data: o.Data = None,
    batch_size: o.BatchSize = 32,
    limit: o.Limit = None,
    threads: o.Threads = None,
    json: o.Json = False,
) -> None:
    """Show what a recipe would remove, layer by layer. Nothing is changed or written.

    Example: secateur plan timm:resnet18 --sparsity 0.9 --allocation erk
    """
    from secateur.cli.recipes import recipe_of
    from secateur.cli.sources import load_inputs

    wanted = recipe_of(
        recipe, sparsity=sparsity, criterion=criterion, pattern=pattern, allocation=allocation, reduction=reduction,
        layers=layers, ignore=ignore, seed=seed,
    )  # fmt: skip
    import secateur as sc

    with progress_bars(json):
        inputs = load_inputs(model, data=data, batch_size=batch_size, limit=limit, threads=threads)
        plan = sc.plan(inputs.loaded.model, wanted, data=inputs.data, example=inputs.example)
    if json:
        print_json(plan)
        return
    out.print(plan_table(plan))
    print_skipped(plan.skipped)


def plan_table(plan: Any) -> Any:
    """A table of the layers of a plan, with the total."""
    from rich.table import Table

    table = Table(
        title=f"The plan removes {plan.sparsity:.1%} of {sum(p.parameters for p in plan.layers):,} weights",
        title_justify="left",
    )
    table.add_column("layer", overflow="fold", min_width=24)
    for name in ("shape", "weights", "removed", "sparsity"):
        table.add_column(name, justify="right")
    for layer in plan.layers:
        shape = "x".join(map(str, layer.shape))
        removed = layer.parameters - layer.kept
        table.add_row(layer.name, shape, f"{layer.parameters:,}", f"{removed:,}", f"{layer.sparsity:.1%}")
    return table


def print_skipped(skipped: Mapping[str, str]) -> None:
    """The layers left alone, and why."""
    for name, why in skipped.items():
        err.print(f"[dim]left alone:[/dim] {name}: {why}", markup=True)
