"""``secateur inspect``: the truth about a checkpoint, ours or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import options as o
from secateur.cli.console import err, out, print_json, progress_bars

NEEDS_ARGUMENTS = True


def command(
    path: Annotated[
        Path,
        typer.Argument(
            help="An artifact, a .safetensors, .packed, .onnx or .npz file, a Hugging Face or exported directory, or a"
            " .pt state dict.",
            show_default=False,
        ),
    ],
    json: o.Json = False,
) -> None:
    """Say what a checkpoint really holds: how sparse each tensor is, which pattern holds, what collapsed.

    Example: secateur inspect runs/first
    """
    from secateur.export.inspect import inspect

    with progress_bars(json):
        found = inspect(path)
    if json:
        print_json(found)
        return
    out.print(_table(found))
    for line in _warnings(found):
        err.print(line, style="yellow", markup=False)


def _table(found: Any) -> Any:
    from rich.table import Table

    from secateur.report.format import count, share, size

    title = (
        f"{found.kind}: {count(found.elements)} values in {len(found.tensors)} tensors, {share(found.sparsity)} zero, "
        f"{size(found.bytes_disk)} on disk"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("tensor", overflow="fold", min_width=24)
    for head in ("shape", "zero", "pattern", "zero rows", "zero columns"):
        table.add_column(head, justify="right")
    for tensor in found.tensors:
        if len(tensor.shape) < 2:
            continue
        shape = "x".join(map(str, tensor.shape))
        rows, columns = (count(n) if n else "" for n in (tensor.zero_rows, tensor.zero_columns))
        table.add_row(tensor.name, shape, share(tensor.sparsity), " ".join(tensor.patterns), rows, columns)
    return table


def _warnings(found: Any) -> list[str]:
    """What is wrong with the checkpoint, in words."""
    from secateur.report.format import size

    lines = [f"{name}: collapsed, all values are the same" for name in found.collapsed]
    lines += [f"{t.name}: {t.nan} NaN and {t.inf} infinite values" for t in found.tensors if t.nan or t.inf]
    if found.bytes_best < 0.8 * found.bytes_disk:
        lines.append(f"stored larger than need be: sc.save would write {size(found.bytes_best)}")
    return lines
