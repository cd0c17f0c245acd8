"""LeNet-300-100 and LeNet-5 (the variant of Caffe), the networks that pruning is first shown on: model sources with a seed.

    secateur inspect examples/lenet.py:lenet_300_100
    secateur prune examples/lenet.py:lenet_5 --data "npz:mnist.npz?split=train" --test "npz:mnist.npz?split=test" ...

Untrained: `seed` draws the initial weights; benchmarks/lenet.py trains and prunes them. LeCun et al. 1998, Gradient-based
learning applied to document recognition; Han et al. 2015, Learning both Weights and Connections, prune these two to a twelfth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.models import ImageInput, Loaded

IMAGE = ImageInput((28, 28), channels=1, mean=(0.1307,), std=(0.3081,))


class LeNet300100(nn.Module):
    """A perceptron, 784-300-100-10: images ``[batch, 1, 28, 28]`` -> logits ``[batch, 10]``. 266,200 weights, 410 biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        hidden = self.fc1(x.flatten(1)).relu()
        return self.fc3(self.fc2(hidden).relu())


class LeNet5(nn.Module):
    """Two convolutions of 5x5 and two layers: ``[batch, 1, 28, 28]`` -> logits ``[batch, 10]``. 430,500 weights, 580 biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.pool(self.conv2(self.pool(self.conv1(x))))
        return self.fc2(self.fc1(x.flatten(1)).relu())


def lenet_300_100(seed: int = 0) -> Loaded:
    """LeNet-300-100 with weights drawn from `seed`."""
    return _made(LeNet300100, seed)


def lenet_5(seed: int = 0) -> Loaded:
    """LeNet-5 with weights drawn from `seed`."""
    return _made(LeNet5, seed)


def _made(network: type[nn.Module], seed: int) -> Loaded:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network()
    return Loaded(model, name=network.__name__.lower(), task="image", example=torch.zeros(1, 1, 28, 28), image=IMAGE)
