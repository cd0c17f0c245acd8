"""2:4: of every four consecutive inputs at most two are kept; two values and two 2-bit positions stand for the four."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from secateur.errors import LayerError


class TwoFour(NamedTuple):
    """A matrix ``[out, in]`` whose groups of four inputs keep at most two."""

    values: Tensor  #: ``[out, in / 2]``: two of each group, in order; zeros fill up groups that keep fewer
    positions: Tensor  #: uint8 ``[out, in / 4]``: the first value's place in bits 0 and 1, the second's in bits 2 and 3


def breaks_two_of_four(weight: Tensor) -> str | None:
    """Why ``weight [out, in]`` is not 2:4 along its inputs, or None where at most 2 of every 4 are nonzero."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return f"its shape {tuple(weight.shape)} has no whole groups of 4 inputs"
    crowded = int(((weight != 0).reshape(-1, 4).sum(dim=1) > 2).sum())
    return f"{crowded} of {weight.numel() // 4} groups of 4 inputs keep more than 2" if crowded else None


def to_two_four(dense: Tensor) -> TwoFour:
    """``dense [out, in]`` -> its 2:4 form. Raises LayerError where a group keeps more than two.

    >>> form = to_two_four(torch.tensor([[0.0, 5.0, 0.0, 7.0]]))
    >>> form.values.tolist(), form.positions.tolist()
    ([[5.0, 7.0]], [[13]])
    """
    if reason := breaks_two_of_four(dense):
        raise LayerError(f"the weight cannot be kept as 2:4: {reason}")
    groups = dense.detach().reshape(dense.shape[0], dense.shape[1] // 4, 4)
    # A stable sort puts the kept ones first; the two places are then brought into ascending order.
    places = (groups == 0).to(torch.uint8).argsort(dim=2, stable=True)[..., :2].sort(dim=2).values
    positions = places[..., 0] | places[..., 1] << 2
    values = groups.gather(2, places).reshape(dense.shape[0], dense.shape[1] // 2)
    return TwoFour(values, positions.to(torch.uint8))


def from_two_four(form: TwoFour) -> Tensor:
    """The inverse of `to_two_four`: ``[out, in]``. Raises LayerError where values and positions do not belong together."""
    values, positions = form
    rows, groups = positions.shape
    if values.shape != (rows, 2 * groups) or positions.dtype != torch.uint8:
        raise LayerError(f"2:4 values {list(values.shape)} need uint8 positions, two for each, not {list(positions.shape)}")
    places = torch.stack((positions & 3, positions >> 2), dim=2).long()
    if bool((places[..., 0] >= places[..., 1]).any()) or bool((places > 3).any()):
        raise LayerError("the two positions of a 2:4 group must ascend and lie in 0 to 3")
    dense = values.new_zeros(rows, groups, 4).scatter_(2, places, values.reshape(rows, groups, 2))
    return dense.reshape(rows, 4 * groups)
