"""ResNet-56 on CIFAR-10 with channels cut out at once, with and without least-squares repair, beside Torch-Pruning 1.6.1.

The inner convolutions of all blocks are cut; the sparsity is found by bisection on the multiply-adds of the plan. Calibration:
2,560 training images spread over the classes. Writes docs/benchmarks/resnet56.md.

    python benchmarks/resnet56.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import numpy as np
import torch
from conditions import ROOT, asset, conditions, keep, table
from torch import Tensor, nn

import secateur as sc
from secateur.graph import cut
from secateur.measure.macs import macs as count

sys.path.append(str(ROOT / "examples"))
from cifar_resnet import make

SPEEDUPS = (1.5, 2.0)
CRITERIA = {"L1": "magnitude", "Taylor": "taylor"}
Batched = list[tuple[Tensor, Tensor]]


def images(split: str, indices: Sequence[int], batch: int) -> Batched:
    """Normalised images and labels in the order of `indices`, in batches."""
    from PIL import Image

    data = np.load(asset("cifar10_jpeg.npz"))
    jpeg, offset, label = (data[f"{split}_{k}"] for k in ("jpeg", "offset", "label"))
    pictures = [np.asarray(Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes()))) for i in indices]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x, y = (x - mean[:, None, None]) / std[:, None, None], torch.from_numpy(label[list(indices)]).long()
    return [(x[i : i + batch], y[i : i + batch]) for i in range(0, len(x), batch)]


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Batched) -> float:
    """Percent."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / sum(len(y) for _, y in batches)


def bisect(macs_at: Callable[[float], float], target: float) -> float:
    """The sparsity at which the multiply-adds are nearest to `target`; they fall as it grows."""
    low, high = 0.0, 0.95
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if macs_at(middle) > target else (low, middle)
    return min((low, high), key=lambda s: abs(macs_at(s) - target))


class Run:
    """The dense network, the data, and the results so far."""

    def __init__(self, options: argparse.Namespace):
        self.model = make(56).model.eval()
        self.example = torch.zeros(1, 3, 32, 32)
        self.macs = macs(self.model)
        train = np.arange(0, 50_000, 50_000 // 2560)[:2560]
        train = np.random.default_rng(0).permutation(train)[: 256 if options.quick else 2560]
        self.data = images("train", train, 128)
        count = 200 if options.quick else 2000
        self.tests = [images("test", range(count), 250), images("test", range(0, 10_000, 10_000 // count), 250)]
        self.keys = {"pattern": "channel", "layers": ["layer*.conv1"], "ignore": ["conv1"], "data": self.data}

    def row(self, speedup: float, name: str, model: nn.Module) -> list[str]:
        """One line of the table, printed as soon as it is known."""
        found = [f"{accuracy(model, t):.1f}" for t in self.tests]
        cells = [f"{speedup:g}x", name, f"{self.macs / macs(model):.2f}x", *found]
        print("|", *cells, flush=True)
        return cells

    def ours(self, speedup: float) -> list[list[str]]:
        """Each criterion, without repair and with."""

        @functools.cache
        def macs_at(sparsity: float) -> float:  # widths, and so multiply-adds, are the same for every criterion
            return macs(cut(self.model, sc.plan(self.model, sparsity=sparsity, example=self.example, **self.keys)))

        sparsity = bisect(macs_at, self.macs / speedup)
        rows = []
        for title, criterion in CRITERIA.items():
            for repair in ("none", "least-squares"):
                keys = {**self.keys, "criterion": criterion, "repair": repair, "reestimate_norms": True}
                result = sc.prune(self.model, sparsity=sparsity, example=self.example, **keys)
                rows.append(self.row(speedup, f"Secateur, {title}, repair {repair}", result.model))
        return rows

    def peer(self, speedup: float) -> list[str]:
        """Torch-Pruning at the same multiply-adds, its BatchNorm statistics re-estimated by the same function."""
        import torch_pruning as tp

        @functools.cache
        def pruned(sparsity: float) -> nn.Module:
            model = copy.deepcopy(self.model)
            wanted = {m.conv1 for m in model.modules() if hasattr(m, "conv2")}
            others = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m not in wanted]
            importance = tp.importance.GroupMagnitudeImportance(p=1)
            tp.pruner.BasePruner(model, self.example, importance, pruning_ratio=sparsity, ignored_layers=others).step()
            return model

        sparsity = bisect(lambda s: macs(pruned(s)), self.macs / speedup)
        model = pruned(sparsity)
        sc.reestimate_norms(model, self.data)
        return self.row(speedup, "Torch-Pruning, L1", model)


def macs(model: nn.Module) -> float:
    """Multiply-adds for one image."""
    return float(count(model, torch.zeros(1, 3, 32, 32)).dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, printed and not kept")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    run = Run(options)
    rows = [run.row(1.0, "dense", run.model)]
    for speedup in SPEEDUPS:
        rows += [*run.ours(speedup), run.peer(speedup)]
    page = [
        "# ResNet-56 on CIFAR-10 with channels cut out at once",
        "",
        "Only the inner convolution of each of the 27 blocks is cut (and the input of the one after it), all by the same "
        "fraction, found by bisection on the multiply-adds. No training; BatchNorm statistics re-estimated in every line but "
        "the dense one, Torch-Pruning's too.",
        "",
        *table(["MACs fewer", "method", "achieved", "first 2,000 test images", "every 5th test image"], rows),
        "",
        "Accuracy in percent. The test images are in the order of their classes, so that the first 2,000 are aeroplanes and "
        "cars only; every 5th gives 2,000 of all ten classes and is the fairer figure. The images were compressed as JPEG, "
        "on which these networks are worse than on the originals.",
        "",
        "Data: calibration on 2,560 training images, 256 of each class, in shuffled batches of 128. Taylor is |weight x "
        "gradient of the loss|, L1 the sum of absolute weights; a channel's score is the mean over all its coupled slices. "
        f"Torch-Pruning {version('torch-pruning')}: `BasePruner`, `GroupMagnitudeImportance(p=1)`, the same layers.",
        "",
        conditions(options.threads, "seed 0", time.monotonic() - started),
    ]
    keep("resnet56.md", page, quick=options.quick)


if __name__ == "__main__":
    main()
