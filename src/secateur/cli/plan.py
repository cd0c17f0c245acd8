"""``secateur plan``: what a recipe would do to a model, without doing it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from secateur.cli import options as o
from secateur.cli.console import err, out, print_json, progress_bars

NEEDS_ARGUMENTS = True
_DIGITS = re.compile(r"\d+")


def command(
    model: o.Model,
    recipe: o.RecipeFile = None,
    sparsity: o.OneSparsity = None,
    budget: o.Budget = None,
    criterion: o.OneCriterion = None,
    pattern: o.Pattern = None,
    allocation: o.Allocation = None,
    reduction: o.Reduction = None,
    layers: o.Layers = None,
    ignore: o.Ignore = None,
    force: o.Force = None,
    seed: o.Seed = None,
    data: o.Data = None,
    batch_size: o.BatchSize = 32,
    limit: o.Limit = None,
    threads: o.Threads = None,
    full: o.Full = False,
    json: o.Json = False,
) -> None:
    """Show what a recipe would remove, layer by layer. Nothing is changed or written.

    Where units are cut out (pattern channel, head, width, ...), every group of slices that live or die together is shown:
    who is coupled to whom and through what, and which groups cannot be cut and why. Groups that do the same in different
    blocks are shown once; --full shows all of them with all names, --json everything as data.

    Example: secateur plan timm:resnet18 --sparsity 0.9 --allocation erk
    """
    from secateur.cli.recipes import recipe_of
    from secateur.cli.sources import load_inputs

    wanted = recipe_of(
        recipe, sparsity=sparsity, budget=budget, criterion=criterion, pattern=pattern, allocation=allocation,
        reduction=reduction, layers=layers, ignore=ignore, force=force, seed=seed,
    )  # fmt: skip
    import secateur as sc

    with progress_bars(json):
        inputs = load_inputs(model, data=data, batch_size=batch_size, limit=limit, threads=threads)
        plan = sc.plan(inputs.loaded.model, wanted, data=inputs.data, example=inputs.example)
    if json:
        print_json(plan)
        return
    out.print(plan_table(plan))
    if plan.budget is not None:
        print_budget(plan.budget)
    print_groups(plan.groups, full=full)
    told = {m.rpartition(":")[0] for g in plan.groups for m in g.members if g.reason}
    print_skipped({name: why for name, why in plan.skipped.items() if name not in told})


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


def print_budget(budget: Any) -> None:
    """What the plan promises, and of milliseconds what was measured."""
    number = "{:.3f}" if budget.unit == "ms" else "{:,.0f}"
    found = "" if budget.achieved is None else f", measured {number.format(budget.achieved)}"
    dense, limit, promised = (number.format(v) for v in (budget.dense, budget.limit, budget.promised))
    out.print(f"budget {budget.asked}: at most {limit} of {dense} {budget.unit}; promised {promised}{found}", markup=False)


def print_groups(groups: Sequence[Any], *, full: bool) -> None:
    """Who is coupled to whom and through what, then what cannot be cut and why; alike groups once, unless `full`."""
    for group, others in _alike([g for g in groups if g.reason is None], _doing, full):
        also = f" (and {others} alike)" if others else ""
        out.print(f"\n[bold]{group.kind}[/bold] {group.kept} of {group.units} stay{also}")
        out.print(f"  slices {_names(group.members, full)}", markup=False)
        for how, where in group.links.items():
            out.print(f"  {how} {_names(where, full)}", markup=False)
    frozen = _alike([g for g in groups if g.reason is not None], lambda g: g.reason.rpartition(" (")[0] or g.reason, full)
    if frozen:
        out.print("\n[bold]cannot be cut[/bold]")
    for group, others in frozen:
        also = f" (and {others} more for this reason)" if others else ""
        out.print(f"  {_names(group.members, full)}: {group.reason}{also}", markup=False)


def _alike(groups: Iterable[Any], key: Callable[[Any], Any], full: bool) -> list[tuple[Any, int]]:
    """The first group of every sort, and how many more there are of it."""
    if full:
        return [(g, 0) for g in groups]
    first: dict[Any, list[Any]] = {}
    for group in groups:
        first.setdefault(key(group), []).append(group)
    return [(same[0], len(same) - 1) for same in first.values()]


def _doing(group: Any) -> Any:
    """Equal for groups that do the same in different blocks of a network."""
    members = frozenset(_DIGITS.sub("#", m) for m in group.members)
    return group.kind, group.units, group.kept, members, tuple(group.links)


def _names(names: Sequence[str], full: bool) -> str:
    shown = names if full or len(names) <= 5 else names[:4]
    return ", ".join(shown) + (f", and {len(names) - len(shown)} more" if len(shown) < len(names) else "")


def print_skipped(skipped: Mapping[str, str]) -> None:
    """The layers left alone, and why."""
    for name, why in skipped.items():
        err.print(f"[dim]left alone:[/dim] {name}: {why}", markup=True)
