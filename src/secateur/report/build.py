"""Helpers that turn tensors into the plain data of a `Report`."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import LayerError
from secateur.types import LayerReport

_ROWS_AT_ONCE = 256
_SPAN = 6.0  #: a histogram reaches this many root mean squares from zero, or to the largest weight where that is nearer


@torch.no_grad()
def histogram(
    weight: Tensor, edges: Sequence[float] | None = None, bins: int = 40
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Edges ``[bins + 1]`` and counts ``[bins]`` of the nonzero weights; NaN and infinities are not counted.

    Without `edges` the range is symmetric about zero. Weights outside are counted in the first and last bin, so that the counts
    always sum to the number of finite nonzero weights.

    >>> histogram(torch.tensor([-1.0, 0.0, 0.5, 1.0]), bins=2)
    ((-1.0, 0.0, 1.0), (1, 2))
    """
    values = weight.detach().reshape(-1).to("cpu", torch.float32)
    values = values[(values != 0) & values.isfinite()]
    if edges is None:
        if bins < 1:
            raise LayerError(f"a histogram needs at least one bin, got {bins}")
        largest = float(values.abs().max()) if values.numel() else 1.0
        spread = _SPAN * float(values.double().square().mean().sqrt()) if values.numel() else 1.0
        reach = min(largest, spread)
        borders = torch.linspace(-reach, reach, bins + 1, dtype=torch.float64).float()
    else:
        borders = torch.tensor(list(edges), dtype=torch.float32)
        if borders.numel() < 2 or not bool((borders[1:] >= borders[:-1]).all()):
            raise LayerError(f"histogram edges must be at least two rising numbers, got {list(edges)[:5]}")
    inner = torch.bucketize(values, borders[1:-1].contiguous(), right=True)
    counts = torch.bincount(inner, minlength=borders.numel() - 1)
    return tuple(borders.tolist()), tuple(counts.tolist())


@torch.no_grad()
def picture(mask: Tensor, cells: int = 64) -> tuple[tuple[float, ...], ...]:
    """Local density of a mask: rows are outputs, columns all else, at most ``cells x cells``, values 0..1 to three digits.

    Each cell is the exact mean over its area, elements on a border counted by the part that lies inside. A dimension of at
    most `cells` elements is shown one cell for each element. A mask without elements has no picture: ``()``.

    >>> picture(torch.tensor([[True, False], [False, True]]))
    ((1.0, 0.0), (0.0, 1.0))
    """
    if cells < 1:
        raise LayerError(f"a picture needs at least one cell, got {cells}")
    if mask.numel() == 0:
        return ()
    plane = mask.reshape(mask.shape[0], -1) if mask.dim() >= 2 else mask.reshape(1, -1)
    columns = _shares(plane.shape[1], cells).T.to(plane.device)
    # the mask is widened to float64 a few rows at a time: a large one would not fit eightfold
    narrow = torch.cat([rows.double() @ columns for rows in plane.split(_ROWS_AT_ONCE)])
    density = _shares(plane.shape[0], cells).to(plane.device) @ narrow
    return tuple(tuple(round(value, 3) for value in row) for row in density.clamp(0, 1).tolist())


def layer_report(
    name: str, weight_before: Tensor, mask: Tensor, pattern: str, error: float | None = None, weight_after: Tensor | None = None
) -> LayerReport:
    """One layer's counts, histograms and mask picture. `mask` has the weight's shape, True = kept.

    `weight_after` is given where a solver or training changed the surviving weights; without it they are those of before.
    Raises LayerError where the shapes differ.
    """
    if mask.shape != weight_before.shape:
        raise LayerError(f"layer {name!r}: its mask is {tuple(mask.shape)}, its weight {tuple(weight_before.shape)}")
    after = weight_before if weight_after is None else weight_after
    if after.shape != mask.shape:
        raise LayerError(f"layer {name!r}: its weight after is {tuple(after.shape)}, its mask {tuple(mask.shape)}")
    before = histogram(weight_before)
    return LayerReport(
        name=name,
        shape=tuple(weight_before.shape),
        parameters=weight_before.numel(),
        kept=int(mask.count_nonzero()),
        pattern=pattern,
        error=error,
        histogram_before=before,
        histogram_after=histogram(after.detach().masked_fill(~mask.bool(), 0), edges=before[0]),
        picture=picture(mask),
    )


def environment(seed: int | None = None) -> dict[str, str]:
    """Versions, processor, threads, system and time: what the figures depend on. No names of hosts, users or files."""
    import secateur

    found = {
        "Secateur": secateur.__version__,
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "Processor": _processor(),
        "Cores": str(os.cpu_count() or "unknown"),
        "Threads": str(torch.get_num_threads()),
        "System": _system(),
        "Seed": "not set" if seed is None else str(seed),
        "Date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if torch.cuda.is_initialized():
        found["Accelerator"] = torch.cuda.get_device_name()
    return found


def _shares(length: int, cells: int) -> Tensor:
    """``[min(cells, length), length]``: the part of each cell that each element covers; rows sum to one."""
    cells = min(cells, length)
    borders = torch.arange(cells + 1, dtype=torch.float64) * length / cells
    elements = torch.arange(length, dtype=torch.float64)
    low = torch.maximum(borders[:-1, None], elements[None])
    high = torch.minimum(borders[1:, None], elements[None] + 1)
    return (high - low).clamp_min(0) * cells / length


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def _system() -> str:
    if platform.system() == "Linux":
        release = Path("/etc/os-release")
        if release.exists():
            pretty = platform.freedesktop_os_release().get("PRETTY_NAME", "")
            return f"{pretty or 'Linux'} ({platform.machine()})"
    return f"{platform.system()} {platform.release()} ({platform.machine()})"
