"""Wanda: weights and activations."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.types import LayerStats, Need


@criterion(
    "wanda",
    needs={Need.INPUT_NORM},
    source="Sun et al. 2023, A Simple and Effective Pruning Approach for LLMs, eq. 1",
    in_turn=True,
)
def wanda(layer: LayerStats) -> Tensor:
    """Weight magnitude times the norm of the input feature it multiplies: ``|W_ij| ||X_j||_2``, the norm and not its square.

    The paper compares within each output row: pattern ``row``. As there, a block's norms are of what it reads once the blocks
    before it are pruned; an allocation that compares layers does so by the norms of the dense model. For convolutions a
    feature is one position of the kernel in one input channel.
    """
    return layer.weight.abs() * layer.need(Need.INPUT_NORM)
