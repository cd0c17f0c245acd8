"""``secateur export``: a model in the format of another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import options as o
from secateur.cli.console import err, out, print_json, progress_bars

NEEDS_ARGUMENTS = True


def command(
    model: o.Model,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="onnx, openvino, torch, executorch, tensorrt, hf, compressed-tensors, csr or safetensors.",
            show_default=False,
        ),
    ],
    path: Annotated[
        Path, typer.Option("--out", "-o", help="File or directory to write.", show_default=False, rich_help_panel=o.RUN)
    ],
    data: o.Data = None,
    batch_size: o.BatchSize = 2,
    int8: Annotated[
        bool, typer.Option("--int8", help="For onnx and tensorrt: Q/DQ nodes, calibrated on --data.", rich_help_panel=o.RUN)
    ] = False,
    opset: Annotated[int, typer.Option("--opset", min=13, help="Of ONNX.", rich_help_panel=o.RUN)] = 20,
    overwrite: o.Overwrite = False,
    threads: o.Threads = None,
    json: o.Json = False,
) -> None:
    """Write a model for another runtime, load it again, and compare its outputs at batch 1, 2 and 7.

    Example: secateur export runs/first --to onnx --data npz:digits.npz --out model.onnx
    """
    import secateur as sc
    from secateur.cli.sources import load_inputs
    from secateur.errors import ExportError

    with progress_bars(json):
        inputs = load_inputs(model, data=data, batch_size=batch_size, threads=threads)
        if int8 and inputs.data is None:
            raise ExportError("--int8 needs calibration batches: give --data")
        found: Any = sc.export(
            inputs.loaded.model, path, to=to, example=inputs.example, int8=inputs.data if int8 else None, opset=opset,
            overwrite=overwrite,
        )  # fmt: skip
    if json:
        print_json(found)
        return
    checks = ", ".join(f"{c.error:.1e} at batch {c.batch}" for c in found.checks)
    out.print(f"{found.to}: {found.path}" + (f"; outputs differ by {checks}" if checks else ""), soft_wrap=True, markup=False)
    if found.command:
        out.print(found.command, soft_wrap=True, markup=False)
    for note in found.notes:
        err.print(f"note: {note}", markup=False)
