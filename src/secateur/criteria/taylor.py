"""Taylor, first order: what the loss would change by if a weight, or a unit of weights, were zero."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.types import LayerStats, Need


@criterion(
    "taylor",
    needs={Need.GRAD},
    source="Molchanov et al. 2017, Pruning CNNs for Resource Efficient Inference, eq. 7; 2019, Importance Estimation, eq. 8",
    reduction="l2",
)
def taylor(layer: LayerStats) -> Tensor:
    """Signed gradient times weight, ``g w``: minus the first-order change of the loss when the weight is removed.

    It is the one criterion whose elements are signed, so that of the reductions only ``l2`` and ``abs_sum`` fit it. With
    ``l2``, the default, a single weight scores ``|g w|`` and a unit the root of the sum of ``(g w)^2`` over its slice (2019,
    its second form for sets of weights). With ``abs_sum`` a unit scores ``|sum of g w|``, its first form: what one weight
    adds and another takes away cancels, and near a minimum, where the mean gradient is small, little is left but noise.
    `g` is the gradient of the mean loss over all calibration samples.
    """
    return layer.need(Need.GRAD) * layer.weight
