"""LAMP: magnitude made comparable between layers."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.lamp import lamp_scores
from secateur.types import LayerStats, Need


@criterion("lamp", needs={Need.WEIGHT}, source="Lee et al. 2021, Layer-adaptive Sparsity for Magnitude-based Pruning, eq. 2")
def lamp(layer: LayerStats) -> Tensor:
    """``w_u^2`` over the sum of ``w_v^2`` of the weights no smaller than it: made for the allocation ``global``.

    Within a layer it ranks as magnitude does. The largest weight of every layer scores 1, so no layer is emptied while
    another has weights to give. Equal weights are told apart as selection does: the lower index is kept.
    """
    weight = layer.weight.flatten()
    largest = weight.abs().amax().clamp_min(1e-38)  # the score does not depend on the scale, and this keeps squares in range
    return lamp_scores((weight / largest).square_()).view(layer.weight.shape)
