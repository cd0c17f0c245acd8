"""Magnitude: small weights matter little."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.types import LayerStats, Need


@criterion(
    "magnitude", needs={Need.WEIGHT}, source="Han et al. 2015, Learning both Weights and Connections; units: Li et al. 2017"
)
def magnitude(layer: LayerStats) -> Tensor:
    """Absolute value of the weight: ``|w|``. A unit scores its L1 norm (reduction ``sum``) or its L2 norm (``l2``)."""
    return layer.weight.abs()
