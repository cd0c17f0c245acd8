"""Execution that depends on the input: quality, mean multiply-adds and time at batch 1, beside static pruning and dense.

ResNet-20 and ResNet-56 on CIFAR-10: Runtime Neural Pruning beside channels cut for good, at equal mean multiply-adds with the
same training for both; early exit and layer skipping. all-MiniLM-L6-v2 on STS-B, ViT-S/14: token pruning and layer skipping.
Every row is kept in the JSON file as soon as it is known, and not measured again; trained networks are kept in --models,
from which --part time20 and time56 take them. Writes docs/benchmarks/dynamic_vision.md and .svg from all rows in the file.

    python benchmarks/dynamic_vision.py rows.json --models DIR [--part resnet20 resnet56 exits skip minilm vit ...] [--quick]
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dynamic_transformers
import torch
from conditions import PAGES, Rows, keep
from dynamic_data import Augmented
from dynamic_page import page, picture
from structured_tasks import batched, cifar, correct
from torch import Tensor, nn
from turning import time_by_turns

import secateur as sc
from secateur.dynamic import Dynamic
from secateur.dynamic.channels import ChannelGate
from secateur.errors import BudgetError
from secateur.measure.macs import macs

BUDGETS = (1.0, 0.8, 0.65, 0.5, 0.4)
STATIC = (0.7, 0.5)
EPOCHS, LR, DECAY = 4, 0.03, 5e-4
LOWEST = 0.3  #: budget down to which RNP is trained
EXAMPLE = torch.zeros(1, 3, 32, 32)


class Bench:
    """What all parts share: rows, folder of models, and the data."""

    def __init__(self, rows: Rows, models: Path, quick: bool):
        self.rows, self.models, self.quick = rows, models, quick
        self.train = Augmented(*cifar("train", 512 if quick else 20_480))
        self.still = batched(*cifar("train", 512 if quick else 5_120), 128)
        self.test = batched(*cifar("test", 500 if quick else 5_000), 250)
        models.mkdir(parents=True, exist_ok=True)

    def dense(self, depth: int) -> nn.Module:
        """The trained network as it comes."""
        from cifar_resnet import make

        return make(depth).model.eval()

    def missing(self, key: str) -> bool:
        """Whether there is no such row yet."""
        return key not in self.rows

    def row(self, key: str, model: nn.Module, seconds: float, whole: float) -> None:
        """Accuracy on the test images, and multiply-adds as a share of the dense network's `whole`."""
        row = {"quality": correct(model, self.test), "macs": macs(model, EXAMPLE).dense / whole, "seconds": seconds}
        self.rows.keep(key, row)

    def curve(self, key: str, gated: Dynamic, whole: float, budgets: tuple[float, ...] = BUDGETS) -> None:
        """One row for each budget: accuracy, mean share of all multiply-adds, and how it spreads over the images."""
        for budget in budgets:
            if not self.missing(f"{key}/{budget}"):
                continue
            try:
                gated.budget = budget
            except BudgetError:
                continue
            with gated.recording() as costs:
                quality = correct(gated, self.test)
            rest = whole - float(costs.dense[0])
            shares = (costs.computed + rest) / whole
            spread = torch.quantile(shares, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)).tolist()
            row = {"quality": quality, "macs": float(shares.mean()), "spread": spread}
            self.rows.keep(f"{key}/{budget}", {**row, "norms": True} if gated.options.get("norms") else row)


def resnet(bench: Bench, depth: int) -> None:
    """Dense, dense trained alike, cut and trained alike, and RNP."""
    name, model = f"resnet{depth}", bench.dense(depth)
    whole = float(macs(model, EXAMPLE).dense)
    if bench.missing(f"{name}/dense"):
        bench.row(f"{name}/dense", model, 0.0, whole)
    if bench.missing(f"{name}/rnp/0.5"):
        rnp(bench, name, depth, whole)
    cuts = {
        "dense tuned": lambda: bench.dense(depth),
        **{f"static {b}": lambda b=b: cut(bench, depth, b) for b in STATIC[::-1]},
    }
    for what, make in cuts.items():
        if bench.missing(f"{name}/{what}"):
            started = time.process_time()
            smaller = make()
            sc.finetune(smaller, bench.train, epochs=EPOCHS, optimizer="sgd", lr=LR, weight_decay=DECAY, warmup=0.05)
            bench.row(f"{name}/{what}", smaller, time.process_time() - started, whole)
            sc.save(smaller, bench.models / f"{name} {what}", overwrite=True)


def rnp(bench: Bench, name: str, depth: int, whole: float) -> None:
    started = time.process_time()
    effort = {"episodes": 256, "steps": 20} if bench.quick else {"episodes": 4096, "steps": 500}
    training = {"epochs": EPOCHS, "lr": LR, "weight_decay": DECAY, "lowest": LOWEST}
    gated = sc.dynamic(bench.dense(depth), method="rnp", data=bench.train, budget=1.0, **training, **effort)
    bench.rows.keep(f"{name}/rnp/seconds", {"seconds": time.process_time() - started})
    sc.save(gated, bench.models / f"{name} rnp", overwrite=True)
    bench.curve(f"{name}/rnp", gated, whole)


def cut(bench: Bench, depth: int, budget: float) -> nn.Module:
    """Inner channels cut for good by magnitude, and repaired, to the share `budget` of the multiply-adds."""
    result = sc.prune(
        bench.dense(depth), pattern="channel", criterion="magnitude", layers=["layer*.conv1"], ignore=["conv1"],
        budget=f"{100 * budget:g}% MACs", repair="least-squares", data=bench.still[:10], example=EXAMPLE,
    )  # fmt: skip
    return result.model


def untrained(bench: Bench, method: str, **options: Any) -> None:
    """Early exit and skipping on the dense networks as they are."""
    for depth in (20, 56):
        name = f"resnet{depth}"
        if not bench.missing(f"{name}/{method}/1.0"):
            continue
        model = bench.dense(depth)
        started = time.process_time()
        gated = sc.dynamic(model, method=method, data=bench.still, budget=1.0, **options)
        bench.rows.keep(f"{name}/{method}/seconds", {"seconds": time.process_time() - started})
        sc.save(gated, bench.models / f"{name} {method}", overwrite=True)
        bench.curve(f"{name}/{method}", gated, float(macs(model, EXAMPLE).dense))


@torch.no_grad()
def choices(bench: Bench) -> None:
    """What RNP's choosing is worth: beside its choices those of other images, one for all images, and the same everywhere."""
    test = batched(*cifar("test", 1000), 250)
    for name in ("resnet20", "resnet56"):
        if bench.missing(f"{name}/rnp/0.5") or not bench.missing(f"{name}/choices/own"):
            continue
        gated: Any = sc.load(bench.models / f"{name} rnp", model=bench.dense(int(name[6:]))).eval()
        gated.budget = 0.5
        decider = next(m for m in gated.modules() if isinstance(m, ChannelGate)).decider
        decider.trace = []
        own = correct(gated, test)
        gates = len(decider.channels)
        chosen = [torch.cat([c for _, c in decider.trace[gate::gates]]) for gate in range(gates)]
        decider.trace = None
        shares, groups = decider.shares, decider.groups
        usual = [int(torch.bincount(c).argmax()) for c in chosen]
        generator = torch.Generator().manual_seed(0)

        def cost(widths: list[Tensor], shares: Tensor = shares, groups: int = groups) -> float:
            return float(sum(s * w.double().mean() / groups for s, w in zip(shares, widths, strict=True)))

        bench.rows.keep(f"{name}/choices/own", {"quality": own, "share": cost(chosen)})
        others: dict[str, Any] = {
            "of other images": functools.partial(other_images, chosen, generator),
            "the most frequent": lambda gate, x, usual=usual: usual[gate],
            "2 groups everywhere": lambda gate, x: 2,
            "3 groups everywhere": lambda gate, x: 3,
        }
        costs = (cost(chosen), cost([torch.tensor(u) for u in usual]), 0.5, 0.75)
        for (what, decider.choose), share in zip(others.items(), costs, strict=True):
            bench.rows.keep(f"{name}/choices/{what}", {"quality": correct(gated, test), "share": share})


def other_images(chosen: list[Tensor], generator: torch.Generator, gate: int, x: Tensor) -> Tensor:
    """Choices of images drawn at random, one for each image of the batch."""
    return chosen[gate][torch.randint(len(chosen[gate]), (len(x),), generator=generator)]


def timed(bench: Bench, depth: int) -> None:
    """Batch 1, one thread, real test images in turn: every model of a network beside its dense one, in the same rounds."""
    name = f"resnet{depth}"
    models: dict[str, nn.Module] = {"dense": bench.dense(depth)}
    for budget in STATIC:
        folder = bench.models / f"{name} static {budget}"
        if folder.exists():
            models[f"static {budget}"] = sc.load(folder, model=cut(bench, depth, budget))
    for method in ("rnp", "early_exit"):
        for budget in BUDGETS:
            if bench.missing(f"{name}/{method}/{budget}"):
                continue
            gated: Any = sc.load(bench.models / f"{name} {method}", model=bench.dense(depth))
            gated.budget = budget
            models[f"{method}/{budget}"] = gated
    images = [x[None] for x in cifar("test", 200)[0]]
    time_by_turns(bench.rows, name, models, images, 60 if bench.quick else 1000)


PARTS: dict[str, Callable[[Bench], None]] = {
    "exits": lambda bench: untrained(bench, "early_exit"),
    "skip": lambda bench: untrained(bench, "skip", samples=512),
    "minilm": lambda bench: dynamic_transformers.minilm(bench.rows, bench.models, bench.quick),
    "vit": lambda bench: dynamic_transformers.vit(bench.rows, bench.models, bench.quick),
    "resnet20": lambda bench: resnet(bench, 20),
    "resnet56": lambda bench: resnet(bench, 56),
    "choices": choices,
    "time20": lambda bench: timed(bench, 20),
    "time56": lambda bench: timed(bench, 56),
    "time-transformers": lambda bench: dynamic_transformers.timed(bench.rows, bench.models, bench.quick),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON file that keeps the rows")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder for trained networks")
    parser.add_argument("--part", nargs="*", default=list(PARTS), choices=list(PARTS), help="none: only write the page")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few images, printed and not kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(Rows(options.rows), options.models, options.quick)
    for part in options.part:
        PARTS[part](bench)
    keep("dynamic_vision.md", page(bench.rows, options.threads), quick=options.quick)
    if not options.quick:
        (PAGES / "dynamic_vision.svg").write_text(picture(bench.rows), encoding="utf-8")


if __name__ == "__main__":
    main()
