"""A small ResNet on 8 x 8 images of digits, trained in seconds: what the examples of dynamic execution start from."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc

data = load_digits()
order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
x, y = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]
train, test = list(zip(x[:1280].split(64), y[:1280].split(64), strict=True)), (x[1280:], y[1280:])


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):  # noqa: D102
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def make():
    """The trained network."""
    torch.manual_seed(0)
    body = nn.Sequential(*[Block(16) for _ in range(4)])
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    sc.finetune(model, train, epochs=3, lr=1e-2)
    return model.eval()


def accuracy(model):
    """On the 517 test images."""
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).float().mean())
