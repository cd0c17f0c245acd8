"""LeNet-300-100 and LeNet-5 on MNIST pruned while they train, for benchmarks/training.py and benchmarks/deep_compression.py.

The images are kept in memory as one tensor. Dense networks are trained with small shifts and turns of the images; the pruned
ones begin as the dense ones with some units cut out, lose weights along a cubic with masks held between the choices, and learn
from the labels and from the dense network. What was tried was compared on 10,000 training images held out (``holdout=True``);
the test images judge the last weights only.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from conditions import ROOT, asset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(ROOT / "examples"))
BATCH = 256


@dataclass(frozen=True)
class Images:
    """Normalised images ``[n, 1, 28, 28]`` and labels ``[n]``, to train on and to judge by."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    def error(self, model: nn.Module) -> float:
        """Of the images to judge by, in percent."""
        model.eval()
        with torch.no_grad():
            parts = zip(self.x_test.split(1000), self.y_test.split(1000), strict=True)
            wrong = sum(int((model(x).argmax(1) != y).sum()) for x, y in parts)
        return 100 * wrong / len(self.y_test)

    def batches(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        """All images to train on, in one order drawn from `seed`."""
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
        return [(self.x[i], self.y[i]) for i in order.split(BATCH)]


@cache
def images(holdout: bool = False) -> Images:
    """MNIST; with `holdout` 10,000 training images take the place of the test images."""
    import numpy as np

    found = np.load(asset("mnist.npz"))
    x, y, x_test, y_test = (torch.from_numpy(found[n]) for n in ("train_x", "train_y", "test_x", "test_y"))
    x, x_test = ((t.float().view(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081 for t in (x, x_test))
    y, y_test = y.long(), y_test.long()
    if not holdout:
        return Images(x, y, x_test, y_test)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(7))
    x, y = x[order], y[order]
    return Images(x[:50000], y[:50000], x[50000:], y[50000:])


def turned(x: Tensor, strength: float, draw: torch.Generator) -> Tensor:
    """Each image turned, scaled, sheared and shifted a little: at strength 1 by up to .2, 10%, .15 and 1.5 pixels."""

    def even(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=draw) * 2 - 1) * strength

    n = len(x)
    angle, size, shear, shift = 0.2 * even(n), 1 + 0.1 * even(n), 0.15 * even(n), even(n, 2) * 1.5 / 14
    c, s = angle.cos() * size, angle.sin() * size
    matrix = torch.stack((torch.stack((c, shear - s, shift[:, 0]), 1), torch.stack((s, c, shift[:, 1]), 1)), 1)
    black = 0.1307 / 0.3081
    return F.grid_sample(x + black, F.affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False) - black


def train(
    model: nn.Module,
    data: Images,
    epochs: int,
    lr: float,
    *,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda z, _, y: F.cross_entropy(z, y),
    strength: float = 0.0,
    weight_decay: float = 0.0,
    batch: int = BATCH,
    seed: int = 0,
    prune: dict[str, Any] | None = None,
) -> None:
    """AdamW, the rate falling along half a cosine; ``loss(scores, images, labels)``. `prune`: keys of sc.gradual."""
    import secateur as sc

    draw = torch.Generator().manual_seed(seed)
    count = len(data.x) // batch
    steps = epochs * count
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=lr, weight_decay=weight_decay)
    pruning: Any = nullcontext()
    if prune is not None:
        settings = {**prune, "begin": 1, "end": int(prune["end"] * steps)}  # the first choice needs a gradient
        pruning = sc.gradual(model, optimizer, **settings)
    model.train()
    with pruning as pruner:
        for step in range(steps):
            if step % count == 0:
                order = torch.randperm(len(data.x), generator=draw)
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            chosen = order[step % count * batch :][:batch]
            x = data.x[chosen]
            if strength:
                x = turned(x, strength, draw)
            optimizer.zero_grad()
            loss(model(x), x, data.y[chosen]).backward()
            optimizer.step()
            if pruner is not None:
                pruner.step()


def taught(teacher: nn.Module, share: float, temperature: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`share` of the divergence from the teacher's softened scores, the rest of the labels' cross-entropy."""
    teacher.eval()

    def loss(made: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if not share:
            return F.cross_entropy(made, y)
        with torch.no_grad():
            wanted = (teacher(x) / temperature).log_softmax(1)
        divergence = F.kl_div((made / temperature).log_softmax(1), wanted, reduction="batchmean", log_target=True)
        return share * temperature**2 * divergence + (1 - share) * F.cross_entropy(made, y)

    return loss


def dense(network: str, seed: int, data: Images, epochs: int, strength: float) -> nn.Module:
    """The trained dense network."""
    import lenet

    model = getattr(lenet, network)(seed).model
    train(model, data, epochs, 2e-3, strength=strength, weight_decay=0.02, seed=seed)
    return model


def nonzeros(model: nn.Module) -> int:
    """Of all parameters, biases too."""
    return sum(int(p.count_nonzero()) for p in model.parameters())


@torch.no_grad()
def without_dead(model: nn.Module) -> None:
    """Zero what reaches no output: weights and biases of neurons and channels that nothing reads. Changes no output."""
    layers = [m for m in model.children() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for layer, reader in zip(reversed(layers[:-1]), reversed(layers[1:]), strict=True):
        read = (reader.weight != 0).any(0)
        read = read.view(layer.weight.shape[0], -1).any(1)
        layer.weight[~read] = 0.0
        layer.bias[~read] = 0.0


def pruned(
    start: nn.Module,
    teacher: nn.Module,
    data: Images,
    keep: int,
    *,
    epochs: int,
    lr: float,
    share: float = 0.5,
    temperature: float = 2.0,
    strength: float = 0.0,
    batch: int = BATCH,
    every: int = 100,
    end: float = 0.5,
    seed: int = 0,
) -> nn.Module:
    """`start` with `keep` weights left (biases apart), learning from `teacher`; by the gradients of the training itself."""
    model = copy.deepcopy(start)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    settings = {
        "criterion": "obd", "sparsity": 1 - keep / weights, "allocation": "global", "end": end, "every": every, "seed": seed,
    }  # fmt: skip
    loss = taught(teacher, share, temperature)
    train(model, data, epochs, lr, loss=loss, strength=strength, batch=batch, seed=seed, prune=settings)
    without_dead(model)
    return model


def halved(
    model: nn.Module, data: Images, teacher: nn.Module, rounds: Sequence[Sequence[str]], epochs: int, seed: int
) -> nn.Module:
    """Half of the channels and neurons cut out in every round, except of the layers it names, with some epochs after each."""
    import secateur as sc

    for spared in rounds:
        cut = sc.prune(model, pattern="channel", sparsity=0.5, allocation="uniform", ignore=spared, example=data.x[:2])
        model = cut.model
        train(model, data, epochs, 2e-3, loss=taught(teacher, 0.5, 2.0), seed=seed)
    return model


def write(file: Path, dense: nn.Module, pruned: nn.Module) -> None:
    """Both networks in one file of safetensors."""
    both = {"dense": dense, "pruned": pruned}
    save_file({f"{which}.{n}": t for which, model in both.items() for n, t in model.state_dict().items()}, file)


def read(file: Path, network: str) -> tuple[nn.Module, nn.Module]:
    """The networks that `write` wrote, the pruned one with as few channels and neurons as it had."""
    import lenet

    found = load_file(file)
    models = []
    for which in ("dense", "pruned"):
        model = getattr(lenet, network)().model
        state = {n.removeprefix(f"{which}."): t for n, t in found.items() if n.startswith(which)}
        for name, layer in list(model.named_children()):
            if hasattr(layer, "weight"):
                outputs, inputs, *kernel = state[f"{name}.weight"].shape
                setattr(model, name, type(layer)(inputs, outputs, *kernel[:1]))
        model.load_state_dict(state)
        models.append(model.eval())
    return models[0], models[1]
