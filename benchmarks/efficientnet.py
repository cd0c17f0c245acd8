"""EfficientNet-Lite0 on ImageNet pruned at once, from the command line, with and without re-estimated BatchNorm statistics.

Runs `secateur prune` on examples/efficientnet_lite0.py: magnitude, Taylor and LAMP at 30, 50 and 70%. The even images of
imagenet_sample_1000.npz calibrate, the odd ones judge. Writes docs/benchmarks/efficientnet.md.

    python benchmarks/efficientnet.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from conditions import ROOT, asset, conditions, keep, table

CRITERIA = ("magnitude", "taylor", "lamp")
SPARSITIES = (0.3, 0.5, 0.7)
#: glibc otherwise gives every activation back to the system and asks for it anew, two thirds of the time on this network.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
BATCH = 25


def command(model: str, out: str, options: argparse.Namespace, criteria, sparsities, *more: str) -> list[str]:
    images = f"npz:{asset('imagenet_sample_1000.npz')}"
    last = ":200" if options.quick else ""
    return [
        *(sys.executable, "-m", "secateur", "prune", model),
        *("--criterion", ",".join(criteria), "--sparsity", ",".join(map(str, sparsities))),
        *("--data", f"{images}[0:{last.strip(':')}:2]", "--test", f"{images}[1:{last.strip(':')}:2]"),
        *("--batch-size", str(BATCH), "--threads", str(options.threads), "--out", out, "--json", *more),
    ]


def run(model: str, options: argparse.Namespace, criteria, sparsities, *more: str) -> list[dict]:
    """The reports, criteria first, as the command prints them."""
    environment = {**KEEP_MEMORY, "OMP_NUM_THREADS": str(options.threads), **os.environ}
    with tempfile.TemporaryDirectory() as folder:
        line = command(model, f"{folder}/out", options, criteria, sparsities, *more)
        print("$", " ".join(line), file=sys.stderr, flush=True)
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"the command ended with status {done.returncode}")
    found = json.loads(done.stdout)
    return found if isinstance(found, list) else [found]


def accuracy(measurement: dict) -> float:
    return 100 * measurement["quality"]["accuracy"]


def grid(model: str, options: argparse.Namespace, criteria, sparsities) -> tuple[float, float, dict]:
    """Accuracy dense, dense with re-estimated statistics, and (criterion, sparsity) -> (plain, re-estimated)."""
    plain = run(model, options, criteria, sparsities)
    norms = run(model, options, criteria, sparsities, "--reestimate-norms")
    kept = run(model, options, ["magnitude"], [0.0], "--reestimate-norms")
    keys = [(c, s) for c in criteria for s in sparsities]
    pairs = {k: (accuracy(p["after"]), accuracy(n["after"])) for k, p, n in zip(keys, plain, norms, strict=True)}
    return accuracy(plain[0]["before"]), accuracy(kept[0]["after"]), pairs


def grid_table(dense: float, dense_norms: float, pairs: dict) -> list[str]:
    rows = [["dense", "0%", f"{dense:.1f}", "", f"{dense_norms:.1f}", ""]]
    for (criterion, sparsity), (plain, norms) in pairs.items():
        lost = f"{dense - plain:+.1f}", f"{dense - norms:+.1f}"
        rows.append([criterion, f"{sparsity:.0%}", f"{plain:.1f}", lost[0], f"{norms:.1f}", lost[1]])
    return table(["criterion", "removed", "at once", "points lost", "statistics re-estimated", "points lost"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="magnitude at 30%% on 200 images, printed and not kept")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    source = f"{ROOT / 'examples' / 'efficientnet_lite0.py'}:make"
    criteria, sparsities = (["magnitude"], [0.3]) if options.quick else (CRITERIA, SPARSITIES)
    dense, dense_norms, pairs = grid(source, options, criteria, sparsities)
    own, own_norms, own_pairs = grid(f"{source}?normalise=own", options, ["magnitude"], sparsities)
    page = [
        "# EfficientNet-Lite0 on ImageNet, pruned at once from the command line",
        "",
        "4.65 million weights, single weights removed, allocation global, no training. Top-1 in percent of "
        f"{100 if options.quick else 500} images: one more or less is {1 if options.quick else 0.2} points.",
        "",
        "    secateur prune examples/efficientnet_lite0.py:make --criterion magnitude,taylor,lamp --sparsity 0.3,0.5,0.7 \\",
        "        --data 'npz:imagenet_sample_1000.npz[0::2]' --test 'npz:imagenet_sample_1000.npz[1::2]' "
        "[--reestimate-norms] --out DIR",
        "",
        "## Images normalised by ImageNet's mean and standard deviation",
        "",
        *grid_table(dense, dense_norms, pairs),
        "",
        "These weights were trained on (x - 127) / 128. Re-estimating adapts the network to the other normalisation too, not "
        "only to the pruning: the line of the dense network tells the two apart, and the table below is without it.",
        "",
        "## Images normalised as in training",
        "",
        *grid_table(own, own_norms, own_pairs),
        "",
        f"On the dense network re-estimating changes {own_norms - own:+.1f} points here, as a few hundred images do not give "
        "the statistics of a whole training: it pays where pruning has moved them further than that.",
        "",
        "Data: `imagenet_sample_1000.npz`, one image a class (some may be training images), even indices calibrate, odd ones "
        f"judge; short side 256, centre 224x224; batches of {BATCH}.",
        "",
        conditions(options.threads, "seed 0 (nothing is drawn)", time.monotonic() - started),
    ]
    keep("efficientnet.md", page, quick=options.quick)


if __name__ == "__main__":
    main()
