"""All layers compete: one ranking over the whole model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import IntTensor

from secateur.select import removed_count, split_counts, spread
from secateur.types import UnitScores


def globally(layers: Mapping[str, UnitScores], sparsity: float) -> dict[str, IntTensor]:
    """The units with the lowest scores of all layers together. A layer may lose everything: the report says so.

    Where units stand for the same number of weights, exactly the asked number of units goes. Where they differ (whole
    neurons of layers of different width), units go from the lowest score up while the weights they stand for stay within
    the target, so it is never exceeded.
    """
    units = list(layers.values())
    if len({u.elements for u in units}) <= 1:
        total = sum(u.total for u in units)
        kept = split_counts(lambda: (u.scores.reshape(-1) for u in units), total - removed_count(total, sparsity))
    else:
        kept = _weighted(units, sparsity)
    return {u.name: spread(k, u.groups) for u, k in zip(units, kept, strict=True)}


def _weighted(units: list[UnitScores], sparsity: float) -> list[int]:
    scores = torch.cat([u.scores.reshape(-1) for u in units])
    owner = torch.repeat_interleave(torch.arange(len(units)), torch.tensor([u.total for u in units]))
    elements = torch.tensor([u.elements for u in units])[owner]
    target = removed_count(int(elements.sum()), sparsity)
    # Among equal scores the lower index is kept: so the order of removal is the flipped order of a stable descending sort.
    order = scores.sort(descending=True, stable=True).indices.flip(0)
    gone = order[elements[order].cumsum(0) <= target]
    removed = torch.bincount(owner[gone], minlength=len(units))
    return [u.total - int(r) for u, r in zip(units, removed, strict=True)]
