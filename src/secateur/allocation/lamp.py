"""Layer-adaptive magnitude: each score relative to what would be left of its layer, then one global ranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import IntTensor

from secateur.allocation.globally import globally
from secateur.lamp import lamp_scores
from secateur.types import UnitScores


def lamp(layers: Mapping[str, UnitScores], sparsity: float) -> dict[str, IntTensor]:
    """Scores squared and divided by the sum of all squares in the layer that are no smaller; then as `global`.

    The best unit of each layer scores 1, so no layer is emptied before all others are down to one unit. With magnitudes
    this is the paper's rule; it serves scores of any criterion that are not negative.
    """

    def rescaled(units: UnitScores) -> UnitScores:
        scores = lamp_scores(units.scores.reshape(-1).square()).reshape(units.groups, units.units)
        return replace(units, compute=lambda: scores)

    return globally({n: rescaled(u) for n, u in layers.items()}, sparsity)
