"""The scale of the normalisation: how much of a channel is let through."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import unit_criterion
from secateur.types import UnitStats


@unit_criterion(
    "bn_scale",
    on="norms",
    source="Liu et al. 2017, Learning Efficient Convolutional Networks through Network Slimming, section 3",
)
def bn_scale(units: UnitStats) -> Tensor:
    """``|gamma|`` of the normalisation that a channel goes through, the mean where a unit has several channels.

    Meant for networks that were trained with `sc.slimming`, which drives the scales of dispensable channels to zero, and for
    the allocation ``global``: the percentile over all scales that the paper takes.
    """
    return units.weight.abs().mean(1)
