"""SNIP: connection sensitivity on one batch."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.types import LayerStats, Need


@criterion(
    "snip",
    needs={Need.GRAD_ONE},
    source="Lee et al. 2019, SNIP, eq. 4 and 5; iterated: de Jorge et al. 2021, Progressive Skeletonization",
)
def snip(layer: LayerStats) -> Tensor:
    """Absolute gradient times weight, ``|g w|``, on the first calibration batch only.

    The paper divides by the sum over the whole network. That is one positive number for all weights and changes no ranking,
    so it is left out. Iterative SNIP is this criterion with the schedule ``exponential``, not another criterion.
    """
    return (layer.need(Need.GRAD_ONE) * layer.weight).abs()
