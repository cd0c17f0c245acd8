"""The criterion's mask with the best weights there are for it."""

from __future__ import annotations

import torch
from torch import IntTensor, Tensor

from secateur.quadratic import by_group, cholesky
from secateur.select import top
from secateur.solvers import refit
from secateur.types import LayerStats, Need, Pattern, Solution


def least_squares(
    weight: Tensor, scores: Tensor, keep: IntTensor, pattern: Pattern, stats: LayerStats, *, damp: float = 0.01
) -> Solution:
    """Keeps the best-scored units and solves for each row exactly: no weights on this mask change the output less.

    `damp` times the mean diagonal is added to the Gram matrix, which draws the weights to where they were. The cost is one
    Cholesky factorisation for each output, so it is meant for small layers and for judging other solvers.

    Source: Hassibi and Stork 1993, Second Order Derivatives for Network Pruning, eq. 5, for many weights at once.
    """
    gram = stats.need(Need.GRAM)
    mask = pattern.unfold(top(scores, keep), weight.shape)
    matrix, _, notes = cholesky(gram, damp, stats.name)
    rows = by_group(weight, gram)
    found = refit.exact(matrix, rows, mask.reshape(rows.shape)).reshape(weight.shape)
    return Solution(mask, torch.where(mask, found, 0), notes)
