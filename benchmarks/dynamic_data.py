"""CIFAR-10 as training data: shuffled, shifted and flipped anew for each epoch, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


@dataclass(frozen=True)
class Augmented:
    """Batches of ``(images, labels)``. Each image is shifted by up to 4 pixels and flipped half of the time."""

    x: Tensor
    y: Tensor
    size: int = 128
    seed: int = 0

    def shuffled(self, seed: int) -> Augmented:
        """The same images in another order, shifted and flipped otherwise."""
        return Augmented(self.x, self.y, self.size, seed)

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.x), generator=generator)[: len(self) * self.size]
        for rows in order.split(self.size):
            yield self._moved(self.x[rows], generator), self.y[rows]

    def _moved(self, x: Tensor, generator: Generator) -> Tensor:
        n, _, height, width = x.shape
        shift = torch.randint(0, 9, (2, n, 1), generator=generator)
        flip = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.arange(width).expand(n, -1)
        columns = torch.where(flip, width - 1 - columns, columns) + shift[0]
        rows = torch.arange(height).expand(n, -1) + shift[1]
        padded = F.pad(x, (4, 4, 4, 4))
        return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
