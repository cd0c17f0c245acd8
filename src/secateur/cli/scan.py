"""``secateur scan``: how much each layer bears."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import options as o
from secateur.cli.console import err, out, print_json, progress_bars

NEEDS_ARGUMENTS = True
CACHE = Path("runs/scan")
SPARSITIES = (0.3, 0.5, 0.7, 0.9)


def command(
    model: o.Model,
    test: o.Test = None,
    evaluate: o.Evaluate = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            "--sparsity",
            "-s",
            help="Sparsities to try on each layer; by default 0.3,0.5,0.7,0.9, or what the pattern fixes (2:4, layer).",
            rich_help_panel=o.METHOD,
        ),
    ] = None,
    criterion: o.OneCriterion = None,
    pattern: o.Pattern = None,
    reduction: o.Reduction = None,
    layers: o.Layers = None,
    ignore: o.Ignore = None,
    seed: o.Seed = None,
    data: o.Data = None,
    batch_size: o.BatchSize = 32,
    limit: o.Limit = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            help="Directory that keeps finished measurements; a scan that was stopped goes on from it.",
            rich_help_panel=o.RUN,
        ),
    ] = CACHE,
    loss: Annotated[
        float,
        typer.Option(
            "--loss",
            min=0.0,
            max=1.0,
            help="Propose for each layer the sparsity that alone costs this fraction of the quality.",
            rich_help_panel=o.METHOD,
        ),
    ] = 0.01,
    threads: o.Threads = None,
    json: o.Json = False,
) -> None:
    """Prune one layer at a time and measure: the layers that bear much and those that bear little, and a ratio for each.

    With a pattern of units (channel, head, ...) groups of coupled units are cut out one at a time, with pattern layer whole
    blocks; 'secateur prune --allocation sensitivity' goes by the same curves.

    Example: secateur scan examples/mlpnet_mnist.py:model --test 'npz:mnist.npz?split=test'
    """
    import secateur as sc
    from secateur.cli.recipes import numbers, piece, scanned
    from secateur.cli.sources import load_inputs
    from secateur.errors import DataError

    pruned = piece(pattern or "element")
    with progress_bars(json):
        inputs = load_inputs(
            model, data=data, test=test, evaluate=evaluate, batch_size=batch_size, limit=limit, threads=threads
        )
        if inputs.evaluate is None:
            raise DataError("a scan measures quality: give --test (batches with labels) or --evaluate (your own measure)")
        curves = sc.scan(
            inputs.loaded.model, evaluate=inputs.evaluate, data=inputs.data,
            sparsities=numbers(sparsity, "--sparsity") or scanned(pruned, SPARSITIES),
            criterion=criterion or "magnitude", pattern=pruned, reduction=reduction, layers=layers,
            ignore=tuple(ignore or ()), example=inputs.example, seed=seed or 0, cache=cache,
        )  # fmt: skip
    if json:
        print_json(list(curves))
    else:
        out.print(_table(curves, loss))
        err.print(
            "The least sensitive layers come last. Prune those harder, or leave the first ones out with --ignore. "
            f"Proposed is what costs {loss:.3g} of the dense quality when only that layer is pruned."
        )


def _table(curves: Any, loss: float) -> Any:
    from rich.table import Table

    from secateur.measure.sensitivity import propose

    points = curves[0].sparsity
    table = Table(title="quality when only this layer is pruned, most sensitive first", title_justify="left")
    table.add_column("layer", overflow="fold", min_width=24)
    for s in points:
        table.add_column("dense" if s == 0 else f"{s:.0%}", justify="right")
    table.add_column("proposed", justify="right")
    proposed = propose(curves, loss=loss)
    for curve in sorted(curves, key=lambda c: sum(c.quality)):
        table.add_row(curve.layer, *(f"{q:.4g}" for q in curve.quality), f"{proposed[curve.layer]:.0%}")
    return table
