"""``secateur demo``: the whole job in under a minute, without data or network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import options as o
from secateur.cli.console import err, out, print_json, progress_bars

NEEDS_ARGUMENTS = False
#: Name of the run -> what it does, in words, and its recipe.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "unstructured-90": ("90% of all weights, wherever they matter least", {"sparsity": 0.9, "steps": 2, "schedule": "cubic"}),
    "two-of-four": ("2 of every 4 weights, the pattern that GPUs compute faster", {"pattern": "2:4"}),
    "half-the-channels": (
        "half of the channels, cut out for real",
        {"sparsity": 0.5, "pattern": "channel"},
    ),
}


def command(
    to: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Directory to write; what an earlier demo left there is replaced.", rich_help_panel=o.RUN
        ),
    ] = Path("secateur-demo"),
    json: o.Json = False,
) -> None:
    """Train a small residual network on handwritten digits, prune it three ways, fine-tune, measure, and write the reports.

    Needs neither data nor network and takes less than a minute on two cores.
    """
    import secateur as sc
    from secateur.cli.report import write_page
    from secateur.data import accuracy
    from secateur.demo import digits, trained
    from secateur.report.html import render_comparison
    from secateur.report.terminal import comparison

    if not json:
        err.print("1. Training a small residual network on handwritten digits; trying how much each layer bears ...")
    with progress_bars(json):
        model = trained()
        curves = sc.scan(model, evaluate=accuracy(digits("test")), sparsities=(0.5, 0.7, 0.9))
    reports: list[Any] = []
    for number, name in enumerate(RUNS, start=2):
        reports.append(_run(model, name, to, json, number, reports[0].before if reports else None, curves))
    write_page(to / "report.html", render_comparison(reports))
    if json:
        print_json(reports)
        return
    out.print()
    out.print(comparison(reports))
    out.print(f"\nThe page with all charts: {to / 'report.html'}")
    out.print(f"Look inside a pruned model: [bold]secateur inspect {to / 'two-of-four'}[/bold]", markup=True)
    out.print("Your own model next: [bold]secateur prune --help[/bold]", markup=True)


def _run(model: Any, name: str, to: Path, json: bool, number: int, before: Any, curves: Any) -> Any:
    import secateur as sc
    from secateur.data import accuracy
    from secateur.demo import digits

    words, recipe = RUNS[name]
    if not json:
        err.print(f"{number}. Pruning {words}; fine-tuning; measuring ...")
    with progress_bars(json):
        result = sc.prune(
            model, {**recipe, "finetune": {"epochs": 3, "lr": 2e-3}}, data=digits("train"),
            evaluate=accuracy(digits("test")), example=digits("test")[0], out=to / name, overwrite=True,
            source="secateur.demo:network", before=before, sensitivity=curves,
        )  # fmt: skip
    return result.report
