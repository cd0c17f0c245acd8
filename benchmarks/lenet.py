"""LeNet-300-100 and LeNet-5 on MNIST, trained here and pruned in steps with fine-tuning: a twelfth of the weights, no loss.

Han et al. 2015 (Learning both Weights and Connections, tables 1, 3 and 4) keep 8% of the weights of both. The same is done
here by sc.prune: magnitude over all layers together, densities falling by the same factor at each step, masks held while
the rest is trained on. Nothing is chosen by the test images: no early stopping, the last weights are the ones that count;
weight decay and epochs of LeNet-300-100 were chosen by every second training image, held out (without weight decay the pruned
network loses .06 points there, with it .18 are won).
Beside the dense network stands the same one trained on for as many epochs as the pruned one, so that the extra training is
not taken for a merit of pruning. Writes docs/benchmarks/lenet_300_100.md and docs/benchmarks/lenet_5.md.

    python benchmarks/lenet.py [--quick] [--seeds 1] [--networks lenet_300_100,lenet_5]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass

from conditions import ROOT, asset, conditions, keep, table

SPARSITY = 0.92
TITLES = {"lenet_300_100": "LeNet-300-100", "lenet_5": "LeNet-5"}
HAN = {"lenet_300_100": "1.64 → 1.59", "lenet_5": "0.80 → 0.77"}


@dataclass(frozen=True)
class Recipe:
    """How one network is trained and pruned."""

    epochs: int  #: of the dense training
    steps: int  #: of pruning
    after: int  #: epochs after each step
    lr: float = 2e-3
    lr_after: float = 2e-3
    weight_decay: float = 0.0
    batch: int = 200


RECIPES = {
    "lenet_300_100": Recipe(epochs=10, steps=5, after=4, weight_decay=0.1),
    "lenet_5": Recipe(epochs=5, steps=5, after=1),
}


@dataclass(frozen=True)
class Outcome:
    """Test errors in percent and what is left of each layer, for one seed."""

    dense: float
    longer: float
    pruned: float
    kept: dict[str, tuple[int, int]]  #: kept and all, by layer
    parameters: int
    nonzeros: int


def outcome(network: str, recipe: Recipe, seed: int, images: str) -> Outcome:
    import secateur as sc
    from secateur.data import accuracy, load_data
    from secateur.models import load_model

    mnist = asset("mnist.npz")
    loaded = load_model(f"{ROOT / 'examples' / 'lenet.py'}:{network}?seed={seed}")
    train = load_data(f"npz:{mnist}{images}?split=train", loaded=loaded, batch_size=recipe.batch)
    measure = accuracy(list(load_data(f"npz:{mnist}?split=test", loaded=loaded, batch_size=1000)), topk=(1,))

    def error(model) -> float:
        return 100 * (1 - measure(model)["accuracy"])

    model, more = loaded.model, recipe.steps * recipe.after
    settings = {"weight_decay": recipe.weight_decay}
    sc.finetune(model, train, epochs=recipe.epochs, lr=recipe.lr, seed=seed, **settings)
    dense = error(model)
    result = sc.prune(
        model, sparsity=SPARSITY, criterion="magnitude", allocation="global", schedule="exponential", steps=recipe.steps,
        finetune={"epochs": recipe.after, "lr": recipe.lr_after, **settings}, train=train, seed=seed,
    )  # fmt: skip
    masks = result.masks
    assert masks.kept() == masks.total() - int(SPARSITY * masks.total() + 0.5)
    pruned, longer = error(result.model), copy.deepcopy(model)
    for step in range(recipe.steps):  # the same epochs, rates and order of images, without masks
        sc.finetune(longer, train, epochs=recipe.after, lr=recipe.lr_after, seed=seed + step, **settings)
    kept = {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}
    after = result.report.after
    found = Outcome(dense, error(longer), pruned, kept, after.parameters, after.nonzeros)
    print(f"{network}, seed {seed}: dense {dense:.2f}, {more} epochs more {found.longer:.2f}, pruned {pruned:.2f}", flush=True)
    return found


def mean(values) -> str:
    values = list(values)
    return f"{statistics.fmean(values):.2f}" + (f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else "")


def seeds_of(count: int) -> str:
    return f"seeds 0 to {count - 1}" if count > 1 else "seed 0"


def page(network: str, recipe: Recipe, runs: list[Outcome], seeds: int) -> list[str]:
    first = runs[0]
    lost = statistics.fmean(r.pruned - r.dense for r in runs)
    errors = [
        ["dense", mean(r.dense for r in runs), f"{first.parameters:,}", "", f"{recipe.epochs}"],
        ["dense, trained on", mean(r.longer for r in runs), f"{first.parameters:,}", "", f"+ {recipe.steps * recipe.after}"],
        [
            *("pruned", mean(r.pruned for r in runs), f"{first.nonzeros:,}"),
            *(f"{first.parameters / first.nonzeros:.1f}x", f"+ {recipe.steps * recipe.after}"),
        ],
    ]
    layers = [
        [name, f"{first.kept[name][1]:,}", mean(100 * r.kept[name][0] / r.kept[name][1] for r in runs)] for name in first.kept
    ]
    rate = f"learning rate {recipe.lr:g} falling to zero along half a cosine"
    return [
        f"# {TITLES[network]} on MNIST, pruned to a twelfth",
        "",
        "Error on the 10,000 test images in percent (0.01 is one image)"
        + (f", mean of {seeds} seeds with the lowest and highest" if seeds > 1 else "")
        + f". {SPARSITY:.0%} of the weights of all layers together are removed, exact to the weight; biases stay.",
        "",
        *table(["network", "error", "parameters not zero", "factor", "epochs"], errors),
        "",
        f"Change of the error by pruning: {lost:+.2f} points. Han et al. 2015 publish {HAN[network]} at 12x.",
        "",
        *table(["layer", "weights", "kept, percent"], layers),
        "",
        f"Dense: AdamW, batches of {recipe.batch}, {rate}. Pruning: magnitude, allocation global, schedule exponential, "
        f"{recipe.steps} steps with {recipe.after} epoch(s) after each, learning rate {recipe.lr_after:g} likewise. Weight "
        f"decay {recipe.weight_decay:g}, no augmentation. Dense, trained on: the same epochs, rates and order of images as in "
        "pruning, without masks.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 epochs dense, 2 steps, a sixth of the images; not kept")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0")
    parser.add_argument("--networks", default=",".join(RECIPES))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    worse = []
    for name in options.networks.split(","):
        began = time.monotonic()
        recipe = Recipe(epochs=2, steps=2, after=1) if options.quick else RECIPES[name]
        images = "[::6]" if options.quick else ""
        runs = [outcome(name, recipe, seed, images) for seed in range(options.seeds)]
        stated = conditions(options.threads, seeds_of(options.seeds), time.monotonic() - began)
        keep(f"{name}.md", [*page(name, recipe, runs, options.seeds), stated], quick=options.quick)
        if statistics.fmean(r.pruned - r.dense for r in runs) > 0:
            worse.append(name)
    if worse and not options.quick:
        raise SystemExit(f"more error than the dense network: {', '.join(worse)}")


if __name__ == "__main__":
    main()
