"""Movement: which weights a training moves away from zero."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.types import LayerStats, Need


@criterion(
    "movement",
    needs={Need.MOVEMENT},
    source="Sanh et al. 2020, Movement Pruning: Adaptive Sparsity by Fine-Tuning, section 4 (first-order score)",
)
def movement(layer: LayerStats) -> Tensor:
    """Sum over the training steps of ``-g w``: high where the training makes a weight larger, negative where it shrinks.

    Only training gives it: use it with `sc.gradual`, and with ``regrow="frozen"``, so that removed weights keep their values
    and their scores go on growing (the paper's straight-through estimator). Allocation ``uniform`` is the paper's
    top-v in every layer. Its soft movement removes where the sigmoid of the score is under one threshold for all layers and
    lets a penalty decide how many that are; a sigmoid ranks as its argument does, so allocation ``global`` removes the
    same weights once the schedule says how many.
    """
    return layer.need(Need.MOVEMENT).clone()
