"""The demo's parts: a small residual network and the handwritten digits that scikit-learn ships. No network, no download."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import MissingExtra

EPOCHS = 8
_TEST = 360  # of 1797 digits


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, inputs, h, w]`` -> ``[batch, outputs, h / stride, w / stride]``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def network(width: int = 32) -> nn.Module:
    """A residual network of 7 weight layers for 8x8 grey images and ten classes, untrained."""
    stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    blocks = nn.Sequential(Block(width, width), Block(width, 2 * width, stride=2))
    return nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def digits(part: str, *, batch_size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Batches of the digits: part ``"train"`` (1437 images) or ``"test"`` (360). Always the same split and order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtra("scikit-learn", "demo", "the demo's handwritten digits") from None
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:_TEST] if part == "test" else order[_TEST:]
    return [(images[i], labels[i]) for i in chosen.split(batch_size)]


def trained(*, epochs: int = EPOCHS) -> nn.Module:
    """The network, trained on the digits from seed 0."""
    from secateur.train.finetune import finetune

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network()
    finetune(model, digits("train"), epochs=epochs, lr=3e-3, weight_decay=1e-2, warmup=0.1)
    return model.eval()
