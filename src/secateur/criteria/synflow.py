"""SynFlow: how much of the network's flow goes through a weight, seen without data."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.types import LayerStats, Need


@criterion("synflow", needs={Need.SYNFLOW_GRAD}, source="Tanaka et al. 2020, Pruning neural networks without any data, eq. 2")
def synflow(layer: LayerStats) -> Tensor:
    """``dR/d|w| |w|``, where R is the sum of the outputs of the network of absolute weights for an input of ones.

    Scores of one layer sum to the same R in every layer of a plain network, which is why no layer is emptied when
    it is applied in many steps (the paper takes 100, schedule ``exponential``). In one step a layer can be.
    """
    return layer.need(Need.SYNFLOW_GRAD) * layer.weight.abs()
