"""Scores of units: the saliencies of all weights that go with a unit, made one number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

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
    saliency = _Saliency(model, scores, reduction)
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
        owner, values = torch.from_numpy(member.units), values[torch.from_numpy(member.indices)]
        if reduction == "max":
            total = total.scatter_reduce(0, owner, values, "amax")
        else:
            total.index_add_(0, owner, values)
            elements += saliency.slice_size(member.tensor, member.dim) * len(values) / units
    if reduction == "l2":
        return total.sqrt()
    if reduction == "abs_sum":
        return total.abs()
    return total / max(elements, 1.0) if reduction == "mean" else total


class _Saliency:
    """Saliencies of weights, summed (for l2 squared and summed, for max maximised) over all dimensions but one."""

    def __init__(self, model: nn.Module, scores: Scores, reduction: Reduction):
        self.layers, _ = find_layers(model)
        self.tensors = dict(model.named_parameters(remove_duplicate=False))
        self.scores, self.reduction = scores, reduction
        self._found: dict[str, dict[int, Tensor]] = {}
        self._scratch = torch.empty(0)

    def slice_size(self, name: str, dim: int) -> float:
        """Number of weights at one index of `dim`."""
        weight = self.tensors[name]
        return weight.numel() / weight.shape[dim]

    def along(self, name: str, dim: int) -> Tensor | None:
        """``[indices of dim]``, or None for what is no weight or has no saliency."""
        if name not in self._found:
            score = self._of(name)
            self._found[name] = (
                {d: self._reduce(score, d).double().cpu() for d in range(score.ndim)} if score is not None else {}
            )
        return self._found[name].get(dim)

    def _of(self, name: str) -> Tensor | None:
        layer = self.layers.get(name)
        if name not in self.tensors or self.tensors[name].ndim < 2:
            return None
        weight = self.tensors[name].detach()
        if self.scores == "l1":
            score = torch.abs(weight, out=self._room(weight))
        elif isinstance(self.scores, Mapping):
            given = self.scores.get(name)
            if given is None:
                return None
            score = layer.stored(given) if layer else given
        else:
            given = self.scores(name, layer.canonical(weight) if layer else weight)  # type: ignore[operator]
            score = layer.stored(given) if layer else given
        score = score.square() if self.reduction == "l2" else score
        if score.ndim <= 2 or layer is None or self.reduction == "max" or not score.is_floating_point():
            return score
        kernel = score.flatten(2)  # a matrix-vector product is the fastest of sums
        return kernel.squeeze(-1) if kernel.shape[-1] == 1 else kernel @ kernel.new_ones(kernel.shape[-1])

    def _room(self, like: Tensor) -> Tensor:
        """Memory that is used again and again: asking for new pages takes longer than the sums."""
        if self._scratch.numel() < like.numel() or self._scratch.dtype != like.dtype or self._scratch.device != like.device:
            self._scratch = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        return self._scratch[: like.numel()].view(like.shape)

    def _reduce(self, score: Tensor, dim: int) -> Tensor:
        rest = [d for d in range(score.ndim) if d != dim]
        if self.reduction == "max":
            return score.amax(rest)
        if score.ndim == 2 and score.is_floating_point():
            return score @ score.new_ones(score.shape[1]) if dim == 0 else score.new_ones(score.shape[0]) @ score
        return score.sum(rest)
