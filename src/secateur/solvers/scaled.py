"""A layer in units of its inputs' size: every feature has norm 1, so that magnitudes are what Wanda looks at."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import BoolTensor, IntTensor, Tensor

from secateur.quadratic import by_group, checked, once_for_each_gram
from secateur.solvers.units import best, gone
from secateur.types import LayerStats, Need, Pattern, Solution

_SAMPLE = 1 << 15  # magnitudes by which a threshold is guessed


@dataclass(frozen=True)
class Form:
    """The damped matrix with a unit diagonal; ``scale`` is the root of the diagonal it had."""

    matrix: Tensor  #: [groups, d, d]
    scale: Tensor  #: [groups, 1, d]
    notes: tuple[str, ...]


@once_for_each_gram
def form(gram: Tensor, damp: float, name: str) -> Form:
    """The form that belongs to a Gram matrix; `name` is the layer's, for messages."""
    matrix, notes = checked(gram, damp, name)
    scale = matrix.diagonal(dim1=1, dim2=2).sqrt()[:, None, :]
    return Form((matrix / scale / scale.transpose(1, 2)).float(), scale.float(), notes)


class Problem:
    """One layer's problem in scaled units: weight ``[groups, rows, d]``, and which weights to keep for a given saliency."""

    def __init__(self, weight: Tensor, scores: Tensor, keep: IntTensor, pattern: Pattern, stats: LayerStats, damp: float):
        gram = stats.need(Need.GRAM)
        self.form = form(gram, damp, stats.name)
        self.weight = by_group(weight, gram) * self.form.scale
        self.keep = keep
        self._shape, self._pattern = weight.shape, pattern
        self._gone = gone(scores, pattern, weight.shape)
        self._any_gone = bool(self._gone.any())
        self._single = scores.shape == (1, weight.numel())

    def mask(self, values: Tensor, keep: IntTensor | None = None) -> BoolTensor:
        """The units whose values, squared and summed, are most: the nearest point to `values` of the asked sparsity."""
        saliency = values.square().reshape(self._shape)
        counts = self.keep if keep is None else keep
        return best(saliency, counts, self._pattern, self._gone).reshape(values.shape)  # type: ignore[return-value]

    def nearly(self, values: Tensor) -> Tensor:
        """As `mask`, but where all weights compete the count is met within a percent: one threshold, from a sample."""
        if not self._single:
            return self.mask(values)
        step = max(1, values.numel() // _SAMPLE)
        while gcd(step, values.shape[2]) > 1:  # or only some of the inputs would be looked at
            step += 1
        sample = values.reshape(-1)[::step].abs()
        removed = round(sample.numel() * (1 - int(self.keep[0]) / values.numel()))
        if not 0 < removed < sample.numel():
            return self.mask(values)
        mask = values.abs() > sample.kthvalue(removed).values
        return mask & ~self._gone.reshape(mask.shape) if self._any_gone else mask

    def solution(self, values: Tensor, mask: Tensor) -> Solution:
        """`values` in the layer's own units and shape."""
        found = (values / self.form.scale).reshape(self._shape)
        mask = mask.reshape(self._shape)
        return Solution(mask, torch.where(mask, found, 0), self.form.notes)  # type: ignore[arg-type]
