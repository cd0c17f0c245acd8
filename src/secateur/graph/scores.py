"""Scores of units: the saliencies of all weights that go with a unit, made one number."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from secateur.graph.graph import Group, Member
from secateur.layers import find_layers

#: ``l1``; a callable ``(name, canonical weight) -> saliency``; or saliencies by parameter name. Higher = keep.
Scores = Literal["l1"] | Callable[[str, Tensor], Tensor] | Mapping[str, Tensor]
Reduction = Literal["sum", "mean", "l2", "max", "abs_sum"]


def unit_scores(
    model: nn.Module,
    groups: Iterable[Group],
    scores: Scores,
    reduction: Reduction = "mean",
    combine: str = "together",
) -> dict[int, Tensor]:
    """For each group ``[units]``: the saliencies of all weights that go with a unit, made one number.

    `reduction` folds the weights of a slice. `combine` says how the slices that a unit has in several tensors count:
    ``together`` as one long slice, or each by itself and then their ``sum``, ``mean`` or ``max``, or the ``first`` alone, that
    of the layer which makes the units.
    """
    groups = list(groups)
    saliency = _Saliency(model, scores, reduction, {(m.tensor, m.dim > 0) for group in groups for m in group.members})
    found = {}
    for group in groups:
        if combine == "together":
            found[group.id] = _fold(group.units, group.members, saliency, reduction)
        else:
            known = [m for m in group.members if saliency.along(m.tensor, m.dim) is not None]
            parts = [_fold(group.units, [m], saliency, reduction) for m in known]
            found[group.id] = combined(parts or [torch.zeros(group.units, dtype=torch.float64)], combine)
    return found


def combined(parts: Sequence[Tensor], how: str) -> Tensor:
    """Scores ``[units]`` that several tensors give to the same units, made one: their sum, mean, max, or the first."""
    stacked = torch.stack(list(parts))
    if how == "first":
        return stacked[0]
    return stacked.sum(0) if how == "sum" else stacked.mean(0) if how == "mean" else stacked.amax(0)


def normalized(scores: Tensor, how: str) -> Tensor:
    """Scores ``[units]`` of a group, divided by their ``mean`` or ``max`` in absolute value, or as they are (``none``)."""
    if how == "none":
        return scores
    scale = scores.abs().mean() if how == "mean" else scores.abs().max()
    return scores / scale if scale > 0 else scores


def _fold(units: int, members: Iterable[Member], saliency: _Saliency, reduction: Reduction) -> Tensor:
    total = torch.zeros(units, dtype=torch.float64)
    elements = 0.0
    for member in members:
        values = saliency.along(member.tensor, member.dim)
        if values is None:
            continue
        number = np.arange(len(values))
        one_each = len(values) == units and (member.indices == number).all() and (member.units == number).all()
        owner = torch.from_numpy(member.units)
        values = values if one_each else values[torch.from_numpy(member.indices)]
        if reduction == "max":
            total = total.scatter_reduce(0, owner, values, "amax")
        elif one_each:
            total += values
        else:
            total.index_add_(0, owner, values)
        if reduction != "max":
            elements += saliency.slice_size(member.tensor, member.dim) * len(values) / units
    if reduction == "l2":
        return total.sqrt()
    if reduction == "abs_sum":
        return total.abs()
    return total / max(elements, 1.0) if reduction == "mean" else total


class _Saliency:
    """Saliencies of weights, summed (for l2 squared and summed, for max maximised) over all dimensions but one.

    A weight is read once, some of its rows at a time: what is made of them stays in the cache until it is summed both ways, and
    needs no memory of the weight's size. `wanted` has the weights whose rows are asked for (False), and those of which other
    dimensions are (True): what nobody asks for is not summed.
    """

    def __init__(self, model: nn.Module, scores: Scores, reduction: Reduction, wanted: Collection[tuple[str, bool]]):
        self.layers = {} if scores == "l1" else find_layers(model)[0]
        self.tensors = dict(model.named_parameters(remove_duplicate=False))
        self.scores, self.reduction, self.wanted = scores, reduction, wanted
        self._found: dict[tuple[str, int], Tensor | None] = {}
        self._sums: dict[str, tuple[Tensor, Tensor] | None] = {}
        self._scratch = torch.empty(0)

    def slice_size(self, name: str, dim: int) -> float:
        """Number of weights at one index of `dim`."""
        weight = self.tensors[name]
        return weight.numel() / weight.shape[dim]

    def along(self, name: str, dim: int) -> Tensor | None:
        """``[indices of dim]``, or None for what is no weight or has no saliency."""
        if name not in self._sums:
            score = self._of(name)
            self._sums[name] = None if score is None else self._folded(name, score)
        sums = self._sums[name]
        if sums is None:
            return None
        if (name, dim) not in self._found:
            first, block = sums
            over = [d for d in range(block.ndim) if d != dim - 1]
            values = first if dim == 0 else block if not over else block.amax(over) if self._highest else block.sum(over)
            self._found[name, dim] = values.double().cpu()
        return self._found[name, dim]

    def _of(self, name: str) -> Tensor | None:
        """The saliency of each weight as it is stored; for l1 the weight itself, of which magnitudes are taken."""
        weight, layer = self.tensors.get(name), self.layers.get(name)
        if weight is None or weight.ndim < 2:
            return None
        if self.scores == "l1":
            return weight.detach()
        if isinstance(self.scores, Mapping):
            given = self.scores.get(name)
        else:
            given = self.scores(name, layer.canonical(weight.detach()) if layer else weight.detach())  # type: ignore[operator]
        return layer.stored(given) if layer and given is not None else given

    @property
    def _highest(self) -> bool:
        return self.reduction == "max"

    def _folded(self, name: str, score: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over all dimensions but the first, and over the first; or the maxima."""
        if self._highest:
            score = score.abs() if self.scores == "l1" else score
            return score.flatten(1).amax(1), score.amax(0)
        return self._summed(score, *((name, further) in self.wanted for further in (False, True)))

    def _summed(self, score: Tensor, by_row: bool, by_column: bool) -> tuple[Tensor, Tensor]:
        """By products with ones, the fastest of sums."""
        score = score if score.is_floating_point() else score.double()
        kind = score.dtype if score.dtype == torch.float64 else torch.float32
        n, inner = len(score), score.shape[1:].numel()
        some = max(1, min(n, _AT_ONCE[score.device.type == "cpu"] // max(inner, 1)))
        room = self._room(some * inner, kind, score.device)
        rows, columns = room.new_empty(n), room.new_zeros(inner)
        across, down = room.new_ones(inner), room.new_ones(some)
        for start in range(0, n, some):
            part = score[start : start + some]
            made = room[: part.numel()].view(part.shape)
            if self.scores == "l1" and score.dtype == kind:
                torch.abs(part, out=made)
            else:
                made.copy_(part)
                made = made.abs_() if self.scores == "l1" else made
            if self.reduction == "l2":
                made.square_()
            matrix = made.view(len(part), inner)
            if by_row:
                torch.mv(matrix, across, out=rows[start : start + len(part)])
            if by_column:
                columns.addmv_(matrix.t(), down[: len(part)])
        return rows, columns.view(score.shape[1:])

    def _room(self, size: int, kind: torch.dtype, device: torch.device) -> Tensor:
        """Memory that is used again and again: asking for new pages takes longer than the sums."""
        if self._scratch.numel() < size or self._scratch.dtype != kind or self._scratch.device != device:
            self._scratch = torch.empty(max(size, _AT_ONCE[device.type == "cpu"]), dtype=kind, device=device)
        return self._scratch[:size]


#: Values worked on at once: on other devices, and on the CPU, where they are to stay in the cache.
_AT_ONCE = (1 << 24, 1 << 19)
