"""MLPNet (784-40-20-10, no bias) of the CHITA paper, trained on MNIST: a model source of one's own.

    secateur measure examples/mlpnet_mnist.py:make --data "npz:mnist.npz?split=test"

The weights are read from the folder that SECATEUR_ASSETS names, or ../shared/assets beside the repository. Benbaki et al.
2023, Fast as CHITA, table 2: 93.97% on the MNIST test images.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.models import ImageInput, Loaded

ASSETS = Path(os.environ.get("SECATEUR_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))


class MLPNet(nn.Module):
    """Images ``[batch, 1, 28, 28]`` -> logits ``[batch, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 40, bias=False)
        self.fc2 = nn.Linear(40, 20, bias=False)
        self.fc3 = nn.Linear(20, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        hidden = self.fc1(x.flatten(1)).relu()
        return self.fc3(self.fc2(hidden).relu())


def make() -> Loaded:
    """The trained network, with the normalisation that it was trained with."""
    model = MLPNet()
    model.load_state_dict(load_file(ASSETS / "chita" / "mlpnet_mnist.safetensors"))
    image = ImageInput((28, 28), channels=1, mean=(0.1307,), std=(0.3081,))
    return Loaded(model, task="image", example=torch.zeros(1, 1, 28, 28), image=image)
