"""FPGM: units that the others of their layer could stand in for."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import unit_criterion
from secateur.types import UnitStats


@unit_criterion(
    "fpgm", on="outputs", source="He et al. 2019, Filter Pruning via Geometric Median for Deep CNNs Acceleration, eq. 6 and 7"
)
def fpgm(units: UnitStats) -> Tensor:
    """Sum of the Euclidean distances from a filter to all others of its layer, ``sum_j ||w_i - w_j||_2``.

    It is lowest at the filter nearest to the geometric median of all of them, which carries least that the others do not.
    """
    weight = units.weight.double()
    gram = weight @ weight.T
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp_min(0).sqrt().sum(1).float()
