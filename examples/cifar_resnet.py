"""The CIFAR-10 ResNets of He et al. 2015 with option-A shortcuts: a model source with an option.

    secateur measure "examples/cifar_resnet.py:make?depth=56" --data "npz:cifar10_jpeg.npz?split=test"

The weights are read from the folder that SECATEUR_ASSETS names, or ../shared/assets beside the repository. On the 10,000
JPEG-compressed test images there, ResNet-20 has 81.03% (91.7% is for the lossless originals).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.models import IMAGENET_MEAN, IMAGENET_STD, ImageInput, Loaded

ASSETS = Path(os.environ.get("SECATEUR_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the shape changes, the shortcut takes every second pixel and pads channels."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.pad = stride, (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.stride != 1 or self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return (out + x).relu()


class ResNet(nn.Module):
    """Images ``[batch, 3, 32, 32]`` -> logits ``[batch, 10]``. `depth` is 6n + 2."""

    def __init__(self, depth: int):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        first = Block(width_in, width, stride)
        return nn.Sequential(first, *(Block(width, width, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = self.bn1(self.conv1(x)).relu()
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))


def make(depth: int = 20) -> Loaded:
    """The trained network of `depth` 20, 32, 44 or 56."""
    model = ResNet(depth)
    weights = load_file(ASSETS / "cifar10_resnet" / f"resnet{depth}.safetensors")
    loaded = model.load_state_dict(weights, strict=False)  # the files leave out BatchNorm's counters of batches, and only these
    if loaded.unexpected_keys or not all(key.endswith("num_batches_tracked") for key in loaded.missing_keys):
        raise ValueError(f"the weights do not fit: {loaded}")
    image = ImageInput((32, 32), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return Loaded(model, name=f"resnet{depth}", task="image", example=torch.zeros(1, 3, 32, 32), image=image)
