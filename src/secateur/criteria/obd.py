"""Optimal Brain Damage: the second-order change of the loss, with a diagonal Hessian."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.types import LayerStats, Need


@criterion("obd", needs={Need.GRAD_SQ}, source="LeCun et al. 1989, Optimal Brain Damage, eq. 5")
def obd(layer: LayerStats) -> Tensor:
    """``h w^2 / 2``: what removing the weight adds to the loss at a minimum, where the loss is quadratic and H diagonal.

    The diagonal `h` is that of the empirical Fisher, the mean of squared per-sample gradients, instead of the paper's
    back-propagated second derivatives: near a minimum of a log-likelihood the two agree.
    """
    return layer.weight.square() * layer.need(Need.GRAD_SQ) / 2
