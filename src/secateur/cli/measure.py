"""``secateur measure``: sizes, multiply-adds, latency and quality of a model."""

from __future__ import annotations

from typing import Annotated

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
    threads: o.Threads = None,
    json: o.Json = False,
) -> None:
    """Measure a model: parameters, nonzeros, multiply-adds, bytes, latency, and quality where --test or --evaluate is given.

    Example: secateur measure torchvision:resnet18
    """
    import secateur as sc
    from secateur.cli.sources import load_inputs
    from secateur.report.terminal import measurement

    with progress_bars(json):
        inputs = load_inputs(model, data=data, test=test, evaluate=evaluate, batch_size=batch_size, threads=threads)
        found = sc.measure(inputs.loaded.model, inputs.example, evaluate=inputs.evaluate, latency=latency)
    if json:
        print_json(found)
    else:
        out.print(measurement(found))
