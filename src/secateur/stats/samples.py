"""Gradients of single samples, or of small groups of them, kept apart: the rows whose products make the empirical Fisher."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.data.batches import Batch, Batches, Loss, size_of
from secateur.layers import Layer
from secateur.memory import portions
from secateur.stats.gradients import gradients, scalar

ROWS = 1024  #: kept apart at most
BYTES = 2 << 30  #: that they may take together


class SampleGradients:
    """Gradients of groups of samples of equal size, as few samples in each as give at most `ROWS` rows within `BYTES`.

    A row is the mean gradient of its samples times the root of their number, so that the mean of its outer products
    estimates the Fisher matrix of single samples whatever the size of the groups. Groups do not reach over batches.
    """

    def __init__(self, model: nn.Module, loss: Loss, layers: Sequence[Layer], sizes: Sequence[int]):
        self._model, self._loss, self._layers = model, loss, layers
        self.group = group_size(layers, sizes)
        rows = _rows(sizes, self.group)
        self._rows = [torch.zeros(rows, *la.parameter.shape, device=la.parameter.device) for la in layers]
        self._samples: list[int] = []

    def add(self, batch: Batch) -> None:
        """Add the samples of `batch`: one backward pass for each group."""
        size = size_of(batch)
        for start in range(0, size, self.group):
            stop = min(start + self.group, size)
            found = gradients(scalar(self._loss(self._model, _part(batch, size, start, stop))), self._layers)
            for rows, gradient in zip(self._rows, found, strict=True):
                if gradient is not None:
                    rows[len(self._samples)] = gradient.float() * math.sqrt(stop - start)
            self._samples.append(stop - start)

    def take(self) -> tuple[dict[str, Tensor], Tensor]:
        """``[rows, *canonical shape]`` by layer, and the samples in each row."""
        count = len(self._samples)
        pairs = zip(self._layers, self._rows, strict=True)
        found = {la.name: (rows.transpose(1, 2) if la.swap else rows)[:count] for la, rows in pairs}
        return found, torch.tensor(self._samples)


def group_size(layers: Sequence[Layer], sizes: Sequence[int]) -> int:
    """Samples in a group for batches of `sizes`: the least that keeps the rows of `layers` within `ROWS` and `BYTES`."""
    weights = sum(layer.parameter.numel() for layer in layers)
    most = max(1, min(ROWS, BYTES // (4 * weights)))
    group, largest = max(1, sum(sizes) // most), max(sizes)
    while group < largest and _rows(sizes, group) > most:
        group += 1
    return group


def layers_in_turn(layers: Mapping[str, Layer], batches: Batches, done: Collection[str] = ()) -> Iterator[dict[str, Layer]]:
    """The layers that are not `done`, as many at a time as `BYTES` hold the rows of, and at least one."""
    rows = min(ROWS, sum(size_of(batch) for batch in batches))
    left = [layer for name, layer in layers.items() if name not in done]
    for part in portions(left, lambda layer: 4 * rows * layer.parameter.numel(), BYTES):
        yield {layer.name: layer for layer in part}


def _rows(sizes: Sequence[int], group: int) -> int:
    return sum(-(-size // group) for size in sizes)


def _part(batch: Batch, size: int, start: int, stop: int) -> Batch:
    """The samples from `start` to `stop` of a batch of `size`."""

    def pick(leaf: Any) -> Any:
        return leaf[start:stop] if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size else leaf

    if isinstance(batch, Mapping):
        return {k: pick(v) for k, v in batch.items()}
    return pytree.tree_map(pick, batch)
