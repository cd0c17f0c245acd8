"""Optimal Brain Surgeon on the empirical Fisher: removes units of least loss and lets the others of their block make up."""

from __future__ import annotations

import torch
from torch import IntTensor, Tensor

from secateur.errors import RecipeError
from secateur.fisher import fisher_blocks, in_blocks
from secateur.select import top
from secateur.solvers.keep import keep as keep_only
from secateur.types import LayerStats, Need, Pattern, Solution


def woodfisher(
    weight: Tensor,
    scores: Tensor,
    keep: IntTensor,
    pattern: Pattern,
    stats: LayerStats,
    *,
    block: int = 50,
    damp: float = 0.1,
) -> Solution:
    """Keeps the units of highest ``1/2 w_Q^T [(F^-1)_QQ]^-1 w_Q`` and updates them by ``-F^-1_.Q [(F^-1)_QQ]^-1 w_Q``.

    F is the mean of outer products of the calibration loss's gradients, one row a sample or a small group of them, in blocks of
    about `block` weights that hold whole units; `damp` times its mean diagonal is added. All that goes from a block goes
    together, in one exact update. The criterion's scores only say how much the layer loses. Patterns of whole outputs
    are carried out as the criterion chose.

    Source: Singh and Alistarh 2020, WoodFisher (the block Fisher); Kurtic et al. 2022, The Optimal BERT Surgeon (units).
    """
    if block < 1 or damp <= 0:
        raise RecipeError(f"woodfisher needs block >= 1 and damp > 0, got block={block}, damp={damp}")
    if pattern.whole_outputs:
        return keep_only(weight, scores, keep, pattern, stats)
    rows = stats.need(Need.GRAD_SAMPLES).flatten(1)
    order = pattern.fold(torch.arange(weight.numel(), device=weight.device).reshape(weight.shape))
    groups, units, size = order.shape
    order = order.reshape(-1)
    width = max(1, block // size) * size
    gone = torch.isneginf(scores).reshape(-1).repeat_interleave(size)
    values = weight.float().reshape(-1)[order].masked_fill(gone, 0)
    fisher = fisher_blocks(rows[:, order].masked_fill_(gone, 0), width, damp)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(fisher))
    within = torch.stack([inverse[:, a : a + size, a : a + size] for a in range(0, width, size)], 1).reshape(-1, size, size)
    each = in_blocks(values, width).reshape(-1, size, 1)
    loss = (each * torch.linalg.solve(within, each)).sum((1, 2))[: groups * units].reshape(groups, units) / 2
    chosen = top(loss.masked_fill(torch.isneginf(scores), -torch.inf), keep)
    kept = in_blocks(chosen.reshape(-1).repeat_interleave(size).float(), width)
    found = _update(fisher, in_blocks(values, width), kept).reshape(-1)[: len(order)]
    result = torch.empty_like(found).scatter_(0, order, found).reshape(weight.shape)
    mask = pattern.unfold(chosen, weight.shape)
    return Solution(mask, torch.where(mask, result, 0))


def _update(fisher: Tensor, values: Tensor, kept: Tensor) -> Tensor:
    """``w_K + F_KK^-1 F_KQ w_Q`` in every block, which is the update of all of Q at once, and zero elsewhere."""
    matrix = fisher * kept[:, :, None] * kept[:, None, :]
    matrix.diagonal(dim1=1, dim2=2).add_(1 - kept)
    side = (fisher @ (values * (1 - kept))[..., None]) * kept[..., None]
    return (values + torch.cholesky_solve(side, torch.linalg.cholesky(matrix))[..., 0]) * kept
