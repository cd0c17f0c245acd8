"""Layer-adaptive magnitude: each score relative to what would be left of its layer, then one global ranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import IntTensor

from secateur.allocation.globally import globally
from secateur.lamp import lamp_scores
from secateur.types import UnitScores


def lamp(layers: Mapping[str, UnitScores], sparsity: float) -> dict[str, IntTensor]:
    """Scores squared and divided by the sum of all squares in the layer that are no smaller; then as `global`.

    The best unit of each layer scores 1, so no layer is emptied before all others are down to one unit. With magnitudes
    this is the paper's rule; it serves scores of any criterion that are not negative. What was removed before stays removed.
    """

    def rescaled(units: UnitScores) -> UnitScores:
        before = units.scores.reshape(-1)
        removed = torch.isneginf(before)
        scores = lamp_scores(before.square().masked_fill_(removed, 0)).masked_fill_(removed, -torch.inf)
        return replace(units, compute=lambda: scores.reshape(units.groups, units.units))

    return globally({n: rescaled(u) for n, u in layers.items()}, sparsity)
