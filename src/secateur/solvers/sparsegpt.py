"""SparseGPT: one sweep over the inputs, in which what is removed is made up for by the inputs still to come."""

from __future__ import annotations

from math import prod

import torch
from torch import IntTensor, Tensor

from secateur.quadratic import by_group, reverse_cholesky
from secateur.solvers.keep import keep as keep_only
from secateur.solvers.units import Stripes
from secateur.types import LayerStats, Need, Pattern, Solution

_COLUMNS = 32  # eliminated one by one before the next ones are updated in one product


def sparsegpt(
    weight: Tensor,
    scores: Tensor,
    keep: IntTensor,
    pattern: Pattern,
    stats: LayerStats,
    *,
    damp: float = 0.01,
    block: int = 128,
) -> Solution:
    """Removes the weights with the least ``w^2 / U_jj^2`` of each block of inputs and lets later inputs compensate.

    ``U`` is the upper Cholesky factor of the inverse of ``G + damp * mean(diag G) I``. The criterion's scores only say how
    much the layer loses; which weights go is decided here, except that what was removed before stays removed. Counts are
    exact: every block of `block` inputs loses the same share as far as whole numbers allow. Whole outputs do not interact,
    so for such patterns nothing can be repaired and the criterion's choice is carried out.

    With ``R = U^-1``, which is a Cholesky factor of the matrix itself, and ``D = W - W'`` the running weight is
    ``W_j + (sum_i<j D_i R_ij) / R_jj``: no inverse is ever formed.

    Source: Frantar and Alistarh 2023, SparseGPT, algorithm 1 (there one weight too many is removed in each block).
    """
    if pattern.whole_outputs:
        return keep_only(weight, scores, keep, pattern, stats)
    gram = stats.need(Need.GRAM)
    _, upper, notes = reverse_cholesky(gram, damp, stats.name)
    before = by_group(weight, gram).to(upper.dtype).transpose(1, 2).contiguous()  # [groups, d, rows]: a column is contiguous
    after = torch.empty_like(before)
    carried = torch.zeros_like(before)  # sum over earlier columns of their change times R
    stripes = Stripes(scores, keep, pattern, weight.shape, block)
    width = prod(weight.shape[2:]) * stripes.channels
    step = max(1, block // width) * width
    for a in range(0, before.shape[1], step):
        b = min(a + step, before.shape[1])
        sweep = _Block(before[:, a:b], carried[:, a:b], upper[:, a:b, a:b])
        for start in range(0, b - a, width):
            sweep.stripe(start, min(start + width, b - a), (a + start) // prod(weight.shape[2:]), stripes, weight.shape)
        after[:, a:b] = sweep.finish()
        if b < before.shape[1]:
            carried[:, b:].baddbmm_(upper[:, a:b, b:].transpose(1, 2), before[:, a:b] - after[:, a:b])
    result = after.transpose(1, 2).reshape(weight.shape).float()
    return Solution(stripes.mask, torch.where(stripes.mask, result, 0), notes)


class _Block:
    """One block of inputs while its stripes are chosen and eliminated. All tensors are ``[groups, inputs, rows]``."""

    def __init__(self, before: Tensor, carried: Tensor, upper: Tensor):
        identity = torch.eye(upper.shape[1], dtype=upper.dtype, device=upper.device).expand_as(upper)
        self._inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
        self._diagonal = self._inverse.diagonal(dim1=1, dim2=2)[..., None]
        self._start = before + self._inverse.transpose(1, 2) @ carried
        self._errors = torch.zeros_like(self._start)  # w / U_jj of what was removed

    def stripe(self, a: int, b: int, channel: int, stripes: Stripes, shape: torch.Size) -> None:
        """Choose among the columns `a` to `b`, which begin at input `channel` of the layer, and eliminate what goes."""
        current = self._start[:, a:b] - self._inverse[:, :a, a:b].transpose(1, 2) @ self._errors[:, :a]
        diagonal = self._diagonal[:, a:b]
        saliency = (current / diagonal).square_().transpose(1, 2)
        mask = stripes.choose(channel, saliency.reshape(shape[0], -1, *shape[2:]))
        scale = torch.where(mask.reshape(saliency.shape).transpose(1, 2), 0, 1 / diagonal)
        for c in range(a, b, _COLUMNS):
            d = min(c + _COLUMNS, b)
            now = current[:, c - a : d - a] - self._inverse[:, a:c, c:d].transpose(1, 2) @ self._errors[:, a:c]
            for j in range(c, d):
                row = self._inverse[:, c:j, j, None].transpose(1, 2)
                weight = torch.baddbmm(now[:, j - c, None], row, self._errors[:, c:j], alpha=-1)[:, 0]
                torch.mul(weight, scale[:, j - a], out=self._errors[:, j])

    def finish(self) -> Tensor:
        """The columns after every elimination."""
        return self._start - self._inverse.transpose(1, 2) @ self._errors
