"""Taylor, first order: what the loss would change by if a weight, or a unit of weights, were zero."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.types import LayerStats, Need


@criterion(
    "taylor",
    needs={Need.GRAD},
    source="Molchanov et al. 2017, Pruning CNNs for Resource Efficient Inference, eq. 7; 2019, Importance Estimation, eq. 8",
    reduction="abs_sum",
)
def taylor(layer: LayerStats) -> Tensor:
    """Signed gradient times weight, ``g w``: minus the first-order change of the loss when the weight is removed.

    It is the one criterion whose elements are signed: with the reduction ``abs_sum`` a single weight scores ``|g w|``, and a
    unit ``|sum of g w over its slice|``, so that what one of its weights adds and another takes away cancels. The 2019
    paper squares both, which ranks alike. `g` is the gradient of the mean loss over all calibration samples.
    """
    return layer.need(Need.GRAD) * layer.weight
