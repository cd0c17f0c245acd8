"""Activations: how large a unit is where the next layer reads it."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import unit_criterion
from secateur.types import UnitNeed, UnitStats


@unit_criterion(
    "activation_norm",
    on="inputs",
    needs={UnitNeed.ACTIVATION_NORM},
    source="Muralidharan et al. 2024, Compact Language Models via Pruning and Knowledge Distillation, section 2.2",
)
def activation_norm(units: UnitStats) -> Tensor:
    """``||a||_2`` of the unit's activations over all samples and positions, padding left out."""
    return units.need(UnitNeed.ACTIVATION_NORM)


@unit_criterion(
    "wanda_unit",
    on="inputs",
    needs={UnitNeed.ACTIVATION_NORM},
    source="Sun et al. 2023, eq. 1, on units: An et al. 2024, Fluctuation-based Adaptive Structured Pruning, Wanda-sp",
)
def wanda_unit(units: UnitStats) -> Tensor:
    """``||a||_2`` times the L1 norm of the weights that read the unit: what it can contribute to the next layer."""
    return units.need(UnitNeed.ACTIVATION_NORM) * units.weight.abs().sum(1)
