"""GraSP: keep the weights through which gradient flows."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.types import LayerStats, Need


@criterion(
    "grasp", needs={Need.HESSIAN_GRAD}, source="Wang et al. 2020, Picking Winning Tickets by Preserving Gradient Flow, eq. 8"
)
def grasp(layer: LayerStats) -> Tensor:
    """Weight times Hessian-gradient product, ``w (H g)``: half of what removing the weight takes from ``||g||^2``.

    The sign is the opposite of the paper's: its score ``S(-w) = -w (H g)`` is the change of ``||g||^2 / 2``, and the paper
    removes the weights with the highest S. Here, as everywhere, higher = keep. Scores may be negative: removing such a weight
    adds gradient. `H` and `g` are of the loss as it is, without the temperature of the authors' code.
    """
    return layer.weight * layer.need(Need.HESSIAN_GRAD)
