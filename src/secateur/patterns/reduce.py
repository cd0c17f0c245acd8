"""Folding the scores of a unit's elements into one score for the unit, by name."""

from __future__ import annotations

from torch import Tensor

from secateur.errors import UnknownName

#: Name of a reduction -> what it does to a unit's elements.
REDUCTIONS = {
    "sum": "sum of the elements' scores; of magnitudes, the L1 norm",
    "mean": "mean of the elements' scores",
    "l2": "square root of the sum of squares; of magnitudes, the L2 norm",
    "max": "the largest element's score",
    "abs_sum": "absolute value of the sum of signed scores",
}


def reduce(folded: Tensor, how: str) -> Tensor:
    """``[groups, units, elements]`` -> ``[groups, units]`` by a reduction of `REDUCTIONS`."""
    single = folded.shape[2] == 1
    if how == "sum":
        return folded[..., 0] if single else folded.sum(2)
    if how == "mean":
        return folded[..., 0] if single else folded.mean(2)
    if how == "l2":
        return folded[..., 0].abs() if single else folded.norm(dim=2)
    if how == "max":
        return folded[..., 0] if single else folded.amax(2)
    if how == "abs_sum":
        return folded[..., 0].abs() if single else folded.sum(2).abs()
    raise UnknownName("reduction", how, REDUCTIONS)
