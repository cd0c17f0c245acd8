"""``secateur deploy``: every layer in the fastest way measured on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import options as o
from secateur.cli.console import err, out, print_json, progress_bars

NEEDS_ARGUMENTS = True


def command(
    model: o.Model,
    data: o.Data = None,
    batch_size: o.BatchSize = 1,
    to: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="File for the deployed weights; secateur.runtime.load reads it.",
            show_default=False,
            rich_help_panel=o.RUN,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            help="Page to write: the time of each layer, dense and sparse, as a picture and a table.",
            show_default=False,
            rich_help_panel=o.RUN,
        ),
    ] = None,
    threads: o.Threads = None,
    json: o.Json = False,
) -> None:
    """Time each layer dense and in every sparse runtime on the shapes it meets, keep the fastest, and show the table.

    Example: secateur deploy runs/first --data npz:digits.npz --batch-size 1
    """
    import secateur as sc
    from secateur.cli.sources import load_inputs
    from secateur.errors import DataError
    from secateur.runtime import save

    with progress_bars(json):
        inputs = load_inputs(model, data=data, batch_size=batch_size, threads=threads)
        if inputs.example is None:
            raise DataError("deploy measures on a batch: give --data, of the batch size the model will meet (--batch-size)")
        fast: Any = sc.deploy(inputs.loaded.model, inputs.example)
    if to is not None:
        save(fast, to)
    if report is not None:
        from secateur.cli.report import write_page
        from secateur.report.deployed import render_deployed

        write_page(report, render_deployed(fast.summary, f"{inputs.loaded.name or model} deployed"))
    if json:
        print_json(fast.summary)
        return
    out.print(layer_table(fast.summary))
    for note in fast.summary.notes:
        err.print(f"note: {note}", markup=False)


def layer_table(summary: Any) -> Any:
    """The layers of a deployed model: what runs where, dense and sparse milliseconds, and why not."""
    from rich.table import Table

    title = (
        f"{summary.dense_ms:.3f} ms dense, {summary.deployed_ms:.3f} ms deployed: {summary.speedup:.2f}x, "
        f"threads: {summary.threads}, outputs differ by {summary.error:.1e}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("layer", overflow="fold", min_width=16)
    for head in ("sparsity", "runtime", "dense ms", "sparse ms"):
        table.add_column(head, justify="right")
    table.add_column("why dense")
    for layer in summary.layers:
        best = min(layer.sparse_ms.values(), default=None)
        times = ("" if value is None else f"{value:.3f}" for value in (layer.dense_ms, best))
        table.add_row(layer.name, f"{layer.sparsity:.1%}", layer.runtime, *times, layer.reason)
    return table
