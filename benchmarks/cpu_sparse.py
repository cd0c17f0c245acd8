"""Claim: pruned networks run faster on CPUs, by how much at which sparsity, beside dense torch and the other runtimes.

Float32. Every row times its candidates in turns, so that what disturbs the machine disturbs all alike; a figure is the
median over rounds of dense time / own time, with the quartiles in brackets where they are further than 5% from it. On one
thread CPU time counts, on more wall-clock time. Networks are checked on real inputs against the masked dense model.

    python benchmarks/cpu_sparse.py ROWS.json [--part peak linear vector convert networks] [--threads 1 2]

Every finished row is kept in ROWS.json and not measured again; `--out` writes the page from all rows there. Peers: peers.py.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from conditions import Rows, processor, show, table
from networks import NETWORKS, check
from peers import Timed, peers, timed

from secateur.runtime import SparseLinear, deploy, native

PARTS = ("peak", "linear", "vector", "convert", "networks")
TOLERANCE = 1e-4
LINEAR = ("torch CSR", "panel, baseline", "panel, avx2", "panel, avx512", "panel-1x4", "panel-4x1")
GOALS = {0.5: 1.2, 0.7: 2.2, 0.8: 3.2, 0.9: 6, 0.95: 10}


def measure(rows: Rows, key: str, make: Callable[[], dict[str, Any]]) -> None:
    """Make the row unless it is there, with its date and the load of the machine."""
    rows.measured(key, lambda: make() | {"date": datetime.date.today().isoformat(), "load": os.getloadavg()[0]})


def rows_of(rows: Rows, part: str) -> dict[tuple[str, ...], dict[str, Any]]:
    """The rows of a part, by what else their keys say."""
    keys = (tuple(key.split("|")) for key in rows)
    return {key[1:]: rows["|".join(key)] for key in keys if key[0] == part}


def clock_for(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


def compare(candidates: dict[str, Timed], seconds: float) -> dict[str, Any]:
    """Ratios of the first candidate's time to each one's, round by round: median, quartiles and the median milliseconds."""
    for run in candidates.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names, start, turn = list(candidates), time.perf_counter(), 0
    while turn < 7 or time.perf_counter() - start < seconds * len(candidates):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            times[name].append(max(candidates[name](), 1e-7))
        turn += 1
    result = {}
    for name, own in times.items():
        ratios = [r / t for r, t in zip(times[names[0]], own, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = {"ratio": middle, "low": low, "high": high, "ms": 1e3 * statistics.median(own)}
    return {"times": result}


def masked(*shape: int, sparsity: float) -> torch.Tensor:
    return torch.randn(*shape) * (torch.rand(*shape) >= sparsity)


def in_blocks(out: int, columns: int, rows: int, cols: int, sparsity: float) -> torch.Tensor:
    keep = (torch.rand(out // rows, columns // cols) >= sparsity).repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    return torch.randn(out, columns) * keep


def peak(rows: Rows, threads: int, seconds: float) -> None:
    def make() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            program = f"{folder}/peak"
            source = Path(__file__).with_name("peak.cpp")
            subprocess.run(["g++", "-O3", "-march=native", "-std=c++20", "-o", program, source], check=True)
            gflops, gigabytes = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
        a = torch.randn(2048, 2048)
        mkl = compare({"mkl": timed(time.process_time, lambda: a @ a)}, seconds)["times"]["mkl"]["ms"]
        return {"gflops": float(gflops), "gigabytes": float(gigabytes), "mkl": 2 * 2048**3 / mkl / 1e6}

    if threads == 1:
        measure(rows, "peak", make)


def linear(rows: Rows, threads: int, seconds: float) -> None:
    def make(columns: int, out: int, sparsity: float) -> dict[str, Any]:
        torch.manual_seed(0)
        clock, x, bias = clock_for(threads), torch.randn(384, columns), torch.randn(out)
        w = masked(out, columns, sparsity=sparsity)
        csr, transposed, program = w.to_sparse_csr(), x.T.contiguous(), native.pack(w)
        candidates = {"dense": timed(clock, lambda: F.linear(x, w, bias))}
        for isa in native.instruction_sets():
            if isa != "avx512vbmi2":  # the same code as avx512 here
                run = lambda isa=isa: native.linear(x, program, bias, (out, columns), 0, isa)  # noqa: E731
                candidates[f"panel, {isa}"] = timed(clock, run)
        for block in ((4, 1), (1, 4)):
            layer = SparseLinear.from_dense(in_blocks(out, columns, *block, sparsity), bias, block=block)
            candidates["panel-{}x{}".format(*block)] = timed(clock, lambda layer=layer: layer(x))
        candidates["torch CSR"] = timed(clock, lambda: csr @ transposed)
        return compare(candidates, seconds)

    for columns, out in ((768, 3072), (3072, 768)):
        for sparsity in GOALS:
            measure(rows, f"linear|{columns} -> {out}|{sparsity}|{threads}", lambda c=columns, o=out, s=sparsity: make(c, o, s))


def vector(rows: Rows, threads: int, seconds: float) -> None:
    def make(sparsity: float) -> dict[str, Any]:
        torch.manual_seed(0)
        clock, x, w = clock_for(threads), torch.randn(1, 4096), masked(4096, 4096, sparsity=sparsity)
        csr, column = w.to_sparse_csr(), x[0]
        candidates = {"dense": timed(clock, lambda: F.linear(x, w))}
        for dtype in native.VALUE_TYPES:
            layer = SparseLinear.from_dense(w, kernel="bitmask", values=dtype)
            candidates[str(dtype).removeprefix("torch.")] = timed(clock, lambda layer=layer: layer(x))
        candidates["torch CSR"] = timed(clock, lambda: csr @ column)
        return compare(candidates, seconds)

    for sparsity in (0.5, 0.7, 0.8, 0.9):
        measure(rows, f"vector|{sparsity}|{threads}", lambda s=sparsity: make(s))


def convert(rows: Rows, threads: int, seconds: float) -> None:
    def make(pack: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        torch.manual_seed(0)
        w = masked(8192, 12288, sparsity=0.9)
        clock, took = clock_for(threads), []
        for _ in range(3):
            start = clock()
            pack(w)
            took.append(clock() - start)
        return {"weights": w.numel(), "seconds": statistics.median(took)}

    for label, pack in (("panel", native.pack), ("bitmask", native.pack_bits)):
        measure(rows, f"convert|{label}|{threads}", lambda pack=pack: make(pack))


def networks(rows: Rows, threads: int, seconds: float, which: str, compiled: bool) -> None:
    for name, (make, sparsities) in NETWORKS.items():
        for sparsity in sparsities:
            if which in f"{name}|{sparsity}":
                key = f"network|{name}|{sparsity}|{threads}"
                measure(rows, key, lambda m=make, s=sparsity: network(m, s, threads, seconds, compiled))


@torch.inference_mode()
def network(make: Callable[[float], Any], sparsity: float, threads: int, seconds: float, compiled: bool) -> dict[str, Any]:
    """One network end to end: eager, ours, and the peers; `compiled` adds torch.compile of the masked and of the deployed."""
    with torch.inference_mode(False):
        case = make(sparsity)
    clock, args = clock_for(threads), case.inputs[0]
    layers = sum(isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) for m in case.model.modules())
    each = min(0.1, 4 / layers)
    models = {"eager": case.model, "deployed": deploy(case.model, case.example, seconds=each)}
    if any(isinstance(m, torch.nn.Linear) for m in case.model.modules()) and args[0].shape[-1] == 1:  # bound by memory
        names = ("bitmask-bfloat16", "bitmask-int8")
        models |= {
            name.removeprefix("bitmask-"): deploy(case.model, case.example, runtimes=[name], seconds=each) for name in names
        }
    notes: dict[str, str] = {}
    if compiled:
        for name in ("eager", "deployed"):
            torch._dynamo.reset()
            fast = torch.compile(models[name])
            try:
                fast(*args)
                models["torch.compile" if name == "eager" else "deployed, torch.compile"] = fast
            except Exception as error:  # the table says why
                notes[f"torch.compile of {name}"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    checks = {key: check(case.model, model, case.inputs) for key, model in models.items() if key != "eager"}
    error, apart = checks["deployed"]
    if not error <= TOLERANCE or not apart > 100 * error:
        raise SystemExit(f"outputs differ by {error:.1e} of the largest, between inputs by {apart:.1e}: the row is worthless")
    candidates = {name: timed(clock, lambda m=model: m(*args)) for name, model in models.items()}
    with tempfile.TemporaryDirectory() as folder, peers(case.model, args, Path(folder), threads, clock) as (others, missing):
        row = compare(candidates | others, seconds)
    layers = models["deployed"].summary.layers
    sparse = sum(layer.runtime != "dense" for layer in layers)
    return {
        **row,
        "errors": {key: found[0] for key, found in checks.items()},
        "apart": apart,
        "replaced": f"{sparse} of {len(layers)}",
        "notes": notes | missing,
    }


def cell(row: dict[str, Any], name: str) -> str:
    found = row["times"].get(name)
    if found is None:
        return "-"
    wide = max(found["high"] - found["ratio"], found["ratio"] - found["low"]) > 0.05 * found["ratio"]
    return f"{found['ratio']:.2f}" + (f" [{found['low']:.2f}, {found['high']:.2f}]" if wide else "")


def page(rows: Rows) -> list[str]:
    """Markdown of every row there is."""
    dates = sorted({row["date"] for row in rows.values()})
    loads = [row["load"] for row in rows.values()]
    lines = ["# Sparse networks on CPUs", "", (__doc__ or "").split("\n\n")[1].replace("\n", " "), ""]
    lines += [
        f"Conditions: {processor()}, {os.cpu_count()} logical cores, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, load "
        f"{min(loads):.1f} to {max(loads):.1f}, torch {torch.__version__}, float32; kernels "
        f"{', '.join(native.instruction_sets())}. Made by `python benchmarks/cpu_sparse.py`."
    ]
    for found in rows_of(rows, "peak").values():
        peaks = f"{found['gflops']:.0f} GFLOP/s in registers, {found['mkl']:.0f} of MKL on 2048 x 2048"
        lines += ["", f"Peaks of one thread, measured: {peaks}, {found['gigabytes']:.0f} GB/s reading memory."]
    lines += linear_tables(rows) + vector_tables(rows) + network_tables(rows)
    done = rows_of(rows, "convert")
    if done:
        lines += ["", "## Conversion", ""]
        body = [
            [label, t, f"{r['weights'] / 1e6:.0f} million at 90%", f"{r['seconds']:.2f} s"] for (label, t), r in done.items()
        ]
        lines += table(["to", "threads", "weights", "time (goal 5 s)"], body)
    return lines


def linear_tables(rows: Rows) -> list[str]:
    found = rows_of(rows, "linear")
    lines = ["", "## Linear layers, 384 rows of activations: speedup over dense torch (MKL)"] if found else []
    for shape, threads in dict.fromkeys((key[0], key[2]) for key in found):
        body = [[name, *(cell(found[shape, str(s), threads], name) if (shape, str(s), threads) in found else "" for s in GOALS)]
                for name in LINEAR]  # fmt: skip
        goals = ["goal of panel", *map(str, GOALS.values())]
        lines += ["", f"{shape}, {threads} thread(s)", "", *table(["", *(f"{s:.0%}" for s in GOALS)], [*body, goals])]
    return lines


def vector_tables(rows: Rows) -> list[str]:
    found = rows_of(rows, "vector")
    lines = ["", "## One row of activations, 4096 x 4096: speedup over dense torch"] if found else []
    for threads in dict.fromkeys(key[1] for key in found):
        head = [s for s, t in found if t == threads]
        names = list(found[head[0], threads]["times"])[1:]
        body = [[name, *(cell(found[s, threads], name) for s in head)] for name in names]
        dense = ", ".join(f"{found[s, threads]['times']['dense']['ms']:.2f}" for s in head)
        lines += [
            "",
            f"{threads} thread(s), dense {dense} ms",
            "",
            *table(["values", *(f"{float(s):.0%}" for s in head)], body),
        ]
    return lines


def network_tables(rows: Rows) -> list[str]:
    found = rows_of(rows, "network")
    if not found:
        return []
    names = list(dict.fromkeys(name for row in found.values() for name in row["times"] if name != "eager"))
    order = list(NETWORKS)
    lines = ["", "## Networks end to end, batch 1: speedup over torch eager"]
    for threads in sorted({key[2] for key in found}):
        body = []
        for (name, sparsity, t), row in sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
            if t == threads:
                eager = f"{row['times']['eager']['ms']:.1f}"
                body.append([name, f"{float(sparsity):.0%}", eager, *(cell(row, n) for n in names)])
        lines += ["", f"{threads} thread(s)", "", *table(["network", "zeros", "eager ms", *names], body)]
    lines += [
        "",
        "Outputs of the deployed model against the masked dense one, on real inputs (goal 1e-4), and how far outputs for "
        "different inputs lie apart, both over the largest output:",
        "",
    ]
    body = []
    for (name, sparsity, t), row in sorted(found.items(), key=lambda item: (order.index(item[0][0]), *item[0][1:])):
        errors = [f"{row['errors'][k]:.1e}" if k in row["errors"] else "-" for k in ("deployed", "bfloat16", "int8")]
        notes = "; ".join(f"{k}: {v}" for k, v in row["notes"].items())
        body.append([name, f"{float(sparsity):.0%}", t, *errors, f"{row['apart']:.2f}", row["replaced"], notes])
    head = ["network", "zeros", "threads", "error", "bfloat16", "int8", "apart", "layers replaced", "notes"]
    return lines + table(head, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON file of finished rows")
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each candidate of a row")
    parser.add_argument("--network", default="", help="only networks whose name or sparsity holds this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="page to write")
    options = parser.parse_args()
    rows = Rows(options.rows)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name, part in (("peak", peak), ("linear", linear), ("vector", vector), ("convert", convert)):
            if name in options.part:
                with torch.no_grad():
                    part(rows, threads, options.seconds)
        if "networks" in options.part:
            networks(rows, threads, options.seconds, options.network, not options.no_compile)
    show(page(rows), options.out)


if __name__ == "__main__":
    main()
