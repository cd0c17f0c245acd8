"""``secateur measure``: sizes, multiply-adds, latency and quality of a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from secateur.cli import options as o
from secateur.cli.console import out, print_json, progress_bars

NEEDS_ARGUMENTS = True


def command(
    model: o.Model,
    data: o.Data = None,
    test: o.Test = None,
    evaluate: o.Evaluate = None,
    batch_size: o.BatchSize = 32,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Time the forward pass.", rich_help_panel=o.RUN)
    ] = True,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers/--no-layers",
            help="Also time each layer, dense and in the sparse runtimes, as deploy does; needs --data.",
            rich_help_panel=o.RUN,
        ),
    ] = False,
    threads: o.Threads = None,
    json: o.Json = False,
) -> None:
    """Measure a model: parameters, nonzeros, multiply-adds, bytes, latency, and quality where --test or --evaluate is given.

    Example: secateur measure torchvision:resnet18
    """
    from dataclasses import asdict

    import secateur as sc
    from secateur.cli.deploy import layer_table
    from secateur.cli.sources import load_inputs
    from secateur.errors import DataError
    from secateur.report.terminal import measurement

    with progress_bars(json):
        inputs = load_inputs(model, data=data, test=test, evaluate=evaluate, batch_size=batch_size, threads=threads)
        if layers and inputs.example is None:
            raise DataError("layers are timed on a batch: give --data, of the batch size the model will meet (--batch-size)")
        found = sc.measure(inputs.loaded.model, inputs.example, evaluate=inputs.evaluate, latency=latency)
        fast: Any = sc.deploy(inputs.loaded.model, inputs.example) if layers else None
    if json:
        print_json({**asdict(found), "deployed": fast.summary} if layers else found)
        return
    out.print(measurement(found))
    if layers:
        out.print(layer_table(fast.summary))
