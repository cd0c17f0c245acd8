"""Claim: a training step with masks held costs at most a few percent more than a dense step, new masks a quarter of a second.

A perceptron of 10 million parameters, float32, random data; steps with and without masks alternate in one process, so
that both meet the same machine. Then one of 25 million is pruned step by step, and each choice of masks is timed.
Run: python benchmarks/hold_cost.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.types import MaskSet

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
}


def build(make, held):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 2740), nn.ReLU(), nn.Linear(2740, 2500), nn.ReLU(), nn.Linear(2500, 128))
    optimizer = make(model.named_parameters())
    if held:
        masks = {n: torch.rand(p.shape) < 0.1 for n, p in model.named_parameters() if p.dim() == 2}
        sc.hold(optimizer, MaskSet(masks))
    return model, optimizer


def step_seconds(model, optimizer, x, y):
    start = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return time.perf_counter() - start


def update_seconds(allocation, choices=12):
    """Seconds of each choice of masks of a network of 25 million parameters, from 0 to 90%."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(24)])
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-4)
    x, times = torch.randn(8, 1024), []
    with sc.gradual(model, optimizer, sparsity=0.9, begin=0, end=choices, allocation=allocation) as pruner:
        for _ in range(choices):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            start = time.perf_counter()
            pruner.step()
            times.append(time.perf_counter() - start)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parameters = sum(p.numel() for p in build(OPTIMIZERS["AdamW"], False)[0].parameters())
    print(f"{parameters / 1e6:.1f}M parameters, float32, cpu, {options.threads} threads, torch {torch.__version__}")
    print(f"medians of {options.repeats} steps after 3 to warm up, dense and held (90% removed) in turn")
    print(f"{'optimizer':14s}{'batch':>6s}{'dense ms':>10s}{'held ms':>10s}{'cost':>8s}")
    for name, make in OPTIMIZERS.items():
        for batch in (32, 128, 512):
            x, y = torch.randn(batch, 1024), torch.randint(0, 128, (batch,))
            pair = [build(make, held) for held in (False, True)]
            times = [[step_seconds(*case, x, y) for case in pair] for _ in range(options.repeats + 3)][3:]
            dense, held = (statistics.median(t) * 1e3 for t in zip(*times, strict=True))
            cost = statistics.median(h / d for d, h in times) - 1
            print(f"{name:14s}{batch:6d}{dense:10.1f}{held:10.1f}{cost:8.1%}")
    print("seconds of a choice of masks, 25.2M parameters, AdamW: median (least to most) of 12, the sparsity rising to 90%")
    for allocation in ("global", "uniform"):
        times = update_seconds(allocation)
        print(f"{allocation:14s}{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})")


if __name__ == "__main__":
    main()
