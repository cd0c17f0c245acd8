"""Global magnitude pruning of 100 million parameters, beside torch.nn.utils.prune.global_unstructured in the same run.

Each repeat runs in a process of its own, which builds the model, notes its memory, prunes to 50% and reports the CPU
seconds (all threads) and the peak of resident memory over the model. The counts removed are checked, on weights as they are
drawn and on weights quantised to seven levels, where nearly everything ties. Writes docs/benchmarks/global_magnitude.md.

    python benchmarks/global_magnitude.py [--repeats 5] [--layers 24] [--width 2048]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

SPARSITY = 0.5
GOAL_CPU_S, GOAL_GB = 1.5, 0.3
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "global_magnitude.md"
NAMES = {"ours": "secateur", "peer": "torch.nn.utils.prune"}


def build(layers: int, width: int, *, levels: bool):
    import torch

    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False, device="meta") for _ in range(layers)))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for layer in model:
            layer.weight.normal_(generator=generator)
            if levels:
                layer.weight.round_().clamp_(-3, 3)
    return model


def prune_ours(model) -> dict:
    from secateur.layers import find_layers
    from secateur.selection import choose, resolve
    from secateur.stats import collect

    layers, _ = find_layers(model)
    method = resolve(criterion="magnitude", pattern="element", allocation="global")
    stats = collect(model, layers, method.needs).layers
    masks = choose(layers, stats, sparsity=SPARSITY, method=method)
    masks.apply(model)
    return masks


def prune_peer(model) -> None:
    from torch.nn.utils import prune

    prune.global_unstructured([(layer, "weight") for layer in model], prune.L1Unstructured, amount=SPARSITY)


def removed(model, masks) -> int:
    if masks is None:
        return sum(int((layer.weight_mask == 0).sum()) for layer in model)
    return masks.total() - masks.kept()


def resident_gb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def child(which: str, layers: int, width: int, threads: int, levels: bool) -> None:
    """Prune once and print what it took. What is imported by then, and the model, do not count."""
    import torch

    torch.set_num_threads(threads)
    prune_one = {"ours": prune_ours, "peer": prune_peer}[which]
    small = build(2, 64, levels=False)
    prune_one(small)  # imports and first-call costs
    model = build(layers, width, levels=levels)
    before = resident_gb()
    cpu, wall = time.process_time(), time.perf_counter()
    masks = prune_one(model)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"cpu_s": cpu, "wall_s": wall, "gb": peak - before, "removed": removed(model, masks)}))


def run_child(which: str, options: argparse.Namespace, *, levels: bool) -> dict:
    arguments = [which, options.layers, options.width, options.threads, int(levels)]
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def page(runs: dict[str, list[dict]], ties: dict[str, dict], options: argparse.Namespace) -> str:
    import torch
    from conditions import processor

    total = options.layers * options.width**2
    want = int(SPARSITY * total + 0.5)
    middle = {k: {f: statistics.median(r[f] for r in rows) for f in ("cpu_s", "gb")} for k, rows in runs.items()}
    ours, peer = middle["ours"], middle["peer"]
    lines = [
        "# Global magnitude pruning of 100 million parameters",
        "",
        f"{options.layers} linear layers of {options.width} x {options.width}, float32, {total:,} weights; "
        f"{SPARSITY:.0%} of them removed.",
        "Median (lowest to highest) of the repeats; memory is the peak of the process over what it held with the model built.",
        "Seven levels: the same weights rounded to whole numbers from -3 to 3, so that nearly all tie; one run.",
        "",
        "| | CPU seconds | wall seconds | GB over the model | removed | seven levels: CPU seconds | removed |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, rows in runs.items():
        figures = " | ".join(spread([r[f] for r in rows]) for f in ("cpu_s", "wall_s", "gb"))
        tied = f"{ties[key]['cpu_s']:.2f} | {ties[key]['removed']:,}"
        lines.append(f"| {NAMES[key]} | {figures} | {rows[0]['removed']:,} | {tied} |")
    ratios = f"{peer['cpu_s'] / ours['cpu_s']:.1f} times fewer CPU seconds, {peer['gb'] / ours['gb']:.1f} times less memory"
    met = ours["cpu_s"] <= GOAL_CPU_S and ours["gb"] <= GOAL_GB
    lines += [
        "",
        f"Asked for: {want:,} of {total:,}. Secateur: {ratios}.",
        f"Goal: at most {GOAL_CPU_S} CPU seconds and {GOAL_GB} GB over the model: {'met' if met else 'not met'}.",
        "",
        f"Conditions: {datetime.date.today().isoformat()}, {processor()}, {os.cpu_count()} logical cores, "
        f"load {os.getloadavg()[0]:.1f}, {options.threads} thread(s), "
        f"Python {platform.python_version()}, torch {torch.__version__}, {options.repeats} repeats, each in its own process, "
        "the two taking turns; one small model pruned beforehand as warm-up. "
        "Made by `python benchmarks/global_magnitude.py`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=5, metavar=("WHICH", "LAYERS", "WIDTH", "THREADS", "LEVELS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        which, *numbers = options.child
        layers, width, threads, levels = map(int, numbers)
        child(which, layers, width, threads, bool(levels))
        return
    runs: dict[str, list[dict]] = {"ours": [], "peer": []}
    for _ in range(options.repeats):
        for key, rows in runs.items():
            rows.append(run_child(key, options, levels=False))
    ties = {key: run_child(key, options, levels=True) for key in runs}
    want = int(SPARSITY * options.layers * options.width**2 + 0.5)
    for counts in (runs["ours"][0], ties["ours"]):
        if counts["removed"] != want:
            raise SystemExit(f"secateur removed {counts['removed']} weights, not {want}")
    text = page(runs, ties, options)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
