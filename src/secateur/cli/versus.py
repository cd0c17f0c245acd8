"""``secateur versus``: a large network pruned, against a small one that was never larger."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import options as o
from secateur.cli.console import err, out, print_json, progress_bars

NEEDS_ARGUMENTS = True
TRAINING = "Training"


def command(
    model: o.Model,
    train: Annotated[str, typer.Option("--train", help="Batches to train on.", show_default=False, rich_help_panel=o.DATA)],
    test: o.Test = None,
    evaluate: o.Evaluate = None,
    by: Annotated[
        str, typer.Option("--by", help="Option of the model's source that says how large it is.", rich_help_panel=o.METHOD)
    ] = "width",
    step: Annotated[
        int, typer.Option("--step", min=1, help="Small networks are multiples of it in size.", rich_help_panel=o.METHOD)
    ] = 1,
    sparsity: Annotated[
        str, typer.Option("--sparsity", "-s", help="Sparsities of the large network.", rich_help_panel=o.METHOD)
    ] = "0.8,0.9",
    criterion: o.OneCriterion = None,
    allocation: o.Allocation = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Of every training.", rich_help_panel=TRAINING)] = 1,
    lr: Annotated[
        float, typer.Option("--lr", help="Highest learning rate of every training.", rich_help_panel=TRAINING)
    ] = 2e-3,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Trainings of each network.", rich_help_panel=TRAINING)] = 1,
    batch_size: o.BatchSize = 32,
    to: Annotated[
        Path, typer.Option("--out", "-o", help="Directory for versus.json and versus.svg.", rich_help_panel=o.RUN)
    ] = Path("runs/versus"),
    threads: o.Threads = None,
    json: o.Json = False,
) -> None:
    """Is a large network pruned better than a small dense one with as many nonzeros, trained alike? Try it, and draw it.

    The model is a callable of yours that builds an untrained network, and takes its size as an option (--by width).

    Example: secateur versus 'examples/characters.py:lstm?width=256' --train 'text:FILE?seqlen=64' --test 'text:FILE'
    """
    from secateur.cli.recipes import numbers
    from secateur.cli.sources import load_inputs
    from secateur.errors import DataError, ModelError
    from secateur.models import Loaded
    from secateur.report.contest import contest_table, draw
    from secateur.sources import call, load_callable
    from secateur.train.versus import versus

    function, source = load_callable(model, ModelError)
    if not isinstance(size := source.options.get(by), int):
        raise ModelError(f"{model!r} does not say how large it is: write it as an option, ?{by}=256, or name another with --by")

    def make(at: int) -> Any:
        made = call(function, replace(source, options={**source.options, by: at}))
        return made.model if isinstance(made, Loaded) else made

    named = {"criterion": criterion, "allocation": allocation}
    with progress_bars(json):
        inputs = load_inputs(model, train=train, test=test, evaluate=evaluate, batch_size=batch_size, threads=threads)
        if inputs.evaluate is None:
            raise DataError("networks are compared by their quality: give --test (batches) or --evaluate (your own measure)")
        rows = versus(
            make, size, inputs.train, inputs.evaluate, sparsities=numbers(sparsity, "--sparsity"), epochs=epochs, lr=lr,
            step=step, seeds=seeds, recipe={k: v for k, v in named.items() if v is not None},
        )  # fmt: skip
    picture = draw(rows, to, title=inputs.loaded.name)
    if json:
        print_json(rows)
        return
    out.print(contest_table(rows))
    err.print(f"The same as a picture: {picture}")
