"""Choosing units inside a solver: exact counts, what is gone stays gone, whole layers at once or a few inputs at a time."""

from __future__ import annotations

from math import prod

import torch
from torch import BoolTensor, IntTensor, Tensor

from secateur.select import top
from secateur.types import Pattern


def gone(scores: Tensor, pattern: Pattern, shape: torch.Size) -> BoolTensor:
    """Weights, in canonical shape, that were removed before: their units score -inf."""
    return pattern.unfold(torch.isneginf(scores), shape)  # type: ignore[arg-type]


def best(saliency: Tensor, keep: IntTensor, pattern: Pattern, removed: BoolTensor) -> BoolTensor:
    """Mask of the ``keep[g]`` units of each group whose weights' saliency, in canonical shape, sums to most."""
    scores = pattern.fold(saliency).sum(2).float()
    scores = scores.masked_fill(pattern.fold(removed).all(2), -torch.inf)
    return pattern.unfold(top(scores, keep), saliency.shape)


class Stripes:
    """Chooses the units of a layer stripe by stripe of its inputs, so that in the end each group has kept the asked count.

    Every stripe loses the same share of its units as far as whole numbers allow: after each one, the number removed is the
    share of the units passed, rounded. A group that lies in one stripe (n:m) gets its count there.
    """

    def __init__(self, scores: Tensor, keep: IntTensor, pattern: Pattern, shape: torch.Size, columns: int):
        self._pattern, self._shape = pattern, shape
        groups, units = scores.shape
        removed = torch.isneginf(scores)
        self._removed = pattern.unfold(removed, shape)  # type: ignore[arg-type]
        number = torch.arange(groups, dtype=torch.int32, device=scores.device)[:, None].expand(groups, units)
        self._group = pattern.unfold(number, shape)  # type: ignore[arg-type]
        self._units = units - removed.sum(1)
        self._target = (self._units - keep.to(scores.device)).clamp_min(0)
        self._passed = torch.zeros_like(self._units)
        self._taken = torch.zeros_like(self._units)
        self.mask: BoolTensor = torch.ones(shape, dtype=torch.bool, device=scores.device)  # type: ignore[assignment]
        self.channels = _stripe(pattern, shape, units, columns)

    @torch.no_grad()
    def choose(self, start: int, saliency: Tensor) -> BoolTensor:
        """Mask of the inputs from `start` on, for which `saliency` ``[out, inputs, *kernel]`` is given, higher = keep."""
        stop = start + saliency.shape[1]
        fold = self._pattern.fold
        group = fold(self._group[:, start:stop])[:, 0, 0].long()
        removed = fold(self._removed[:, start:stop]).all(2)
        self._passed[group] += (~removed).sum(1)
        whole = self._units[group].clamp_min(1)
        taken = (2 * self._target[group] * self._passed[group] + whole) // (2 * whole)
        keep = (~removed).sum(1) - (taken - self._taken[group])
        self._taken[group] = taken
        scores = fold(saliency).sum(2).masked_fill(removed, -torch.inf)
        self.mask[:, start:stop] = self._pattern.unfold(top(scores, keep), saliency.shape)
        return self.mask[:, start:stop]  # type: ignore[return-value]


def _stripe(pattern: Pattern, shape: torch.Size, units: int, columns: int) -> int:
    """Inputs in a stripe: as few as hold whole groups where groups are local, else about `columns` columns of the matrix."""
    inputs, kernel = shape[1], prod(shape[2:])
    smallest = inputs
    for count in range(1, inputs + 1):
        piece = torch.Size((shape[0], count, *shape[2:]))
        if inputs % count == 0 and pattern.refuses(piece) is None:
            smallest = count
            break
    if _units(pattern, torch.Size((shape[0], smallest, *shape[2:]))) == units:
        return smallest
    return min(inputs, max(1, columns // (kernel * smallest)) * smallest)


def _units(pattern: Pattern, shape: torch.Size) -> int:
    return int(pattern.fold(torch.empty(shape, device="meta")).shape[1])
