"""Claim: on GPUs, 2:4 layers and bitmask matrix-vector products run faster than dense ones, by how much, and where not.

2:4 through torch's semi-structured tensors (cuSPARSELt or CUTLASS), each shape probed first; the Triton kernel of
`secateur.runtime.triton_matvec` for 1 to 16 rows of activations. Where no CUDA device is at hand it says so and measures
nothing; no figure of a GPU stands in the documents that this script did not print on one.

    python benchmarks/gpu_sparse.py [--seconds 0.5] [--out docs/benchmarks/gpu_sparse.md]
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from conditions import table
from torch import Tensor, nn

from secateur.runtime.runtimes import RUNTIMES

SHAPES = ((4096, 4096), (4096, 11008), (768, 3072))  #: inputs, outputs
ROWS_24 = (1, 16, 64, 256, 1024)
ROWS_VECTOR = (1, 2, 4, 8, 16)
SPARSITIES = (0.5, 0.7, 0.8, 0.9)


def ratio(dense: Callable[[], Tensor], other: Callable[[], Tensor], seconds: float) -> tuple[float, float]:
    """Median of dense time / other time, in turns, and the dense milliseconds; each timed with events of the device."""

    def once(run: Callable[[], Tensor]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(20):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 20

    for run in (dense, other, dense, other):
        once(run)
    times, begin = [], time.perf_counter()
    while len(times) < 7 or time.perf_counter() - begin < seconds:
        times.append((once(dense), once(other)))
    return statistics.median(d / o for d, o in times), statistics.median(d for d, _ in times)


def two_of_four(weight: Tensor) -> Tensor:
    groups = weight.reshape(-1, 4)
    keep = torch.zeros_like(groups).scatter_(1, groups.abs().topk(2, dim=1).indices, 1)
    return (groups * keep).reshape(weight.shape)


def layer(columns: int, out: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(columns, out, bias=False, device="cuda", dtype=dtype).requires_grad_(False)


def measured(runtime: str, module: nn.Linear, x: Tensor, seconds: float) -> str:
    """Speedup, or why the runtime refuses the layer."""
    made = RUNTIMES[runtime].make()
    if reason := made.refuses(module, x):
        return f"refused: {reason}"
    fast = made.convert(module)
    expected, got = module(x), fast(x)
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error < 2e-2:
        return f"wrong: outputs differ by {error:.1e}"
    gain, dense = ratio(lambda: module(x), lambda: fast(x), seconds)
    return f"{gain:.2f} ({1e3 * dense:.0f} us)"


@torch.inference_mode()
def page(seconds: float) -> list[str]:
    card = torch.cuda.get_device_name()
    lines = ["# Sparse layers on GPUs", "", f"{card}, {datetime.date.today().isoformat()}, torch {torch.__version__}, CUDA "]
    lines[-1] += f"{torch.version.cuda}. Speedup over the dense layer (its time); medians of ratios taken in turns."
    for dtype in (torch.float16, torch.bfloat16):
        body = []
        for columns, out in SHAPES:
            module = layer(columns, out, dtype)
            module.weight.copy_(two_of_four(module.weight))
            inputs = [torch.randn(rows, columns, device="cuda", dtype=dtype) for rows in ROWS_24]
            body.append([f"{columns} -> {out}", *(measured("2:4", module, x, seconds) for x in inputs)])
        lines += ["", f"## 2:4, {dtype}", "", *table(["layer", *(f"{rows} rows" for rows in ROWS_24)], body)]
    for dtype in (torch.float16, torch.float32):
        body = []
        for columns, out in SHAPES[:2]:
            for sparsity in SPARSITIES:
                module = layer(columns, out, dtype)
                module.weight.mul_(torch.rand(out, columns, device="cuda") >= sparsity)
                inputs = [torch.randn(rows, columns, device="cuda", dtype=dtype) for rows in ROWS_VECTOR]
                cells = (measured("triton-bitmask", module, x, seconds) for x in inputs)
                body.append([f"{columns} -> {out}", f"{sparsity:.0%}", *cells])
        lines += ["", f"## Bitmask matrix-vector, Triton, {dtype}", ""]
        lines += table(["layer", "zeros", *(f"{rows} rows" for rows in ROWS_VECTOR)], body)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    parser.add_argument("--out", type=Path, help="page to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stdout.write("no CUDA device on this machine: nothing was measured\n")
        return
    torch.manual_seed(0)
    text = "\n".join(page(options.seconds)) + "\n"
    sys.stdout.write(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
