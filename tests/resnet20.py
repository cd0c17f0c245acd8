"""ResNet-20 of the examples, with and without its trained weights, and the images it was trained and tested on."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from assets import asset
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from cifar_resnet import ResNet, make


def untrained() -> ResNet:
    return ResNet(20)


def trained() -> ResNet:
    asset("cifar10_resnet/resnet20.safetensors")  # skips where it is absent
    return make(20).model.eval()


def images(split: str, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Normalised images ``[n, 3, 32, 32]`` and labels."""
    from PIL import Image

    data = np.load(asset("cifar10_jpeg.npz"))
    jpeg, offset, label = (data[f"{split}_{k}"] for k in ("jpeg", "offset", "label"))
    pictures = [np.asarray(Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes()))) for i in indices]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / std[:, None, None], torch.from_numpy(label[list(indices)]).long()
