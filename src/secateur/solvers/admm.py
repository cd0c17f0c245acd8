"""ADMM with a mask that tightens: twenty cheap steps between the dense optimum and the sparse set."""

from __future__ import annotations

import torch
from torch import IntTensor, Tensor

from secateur.errors import RecipeError
from secateur.quadratic import once_for_each_gram
from secateur.solvers.keep import keep as keep_only
from secateur.solvers.scaled import Problem
from secateur.types import LayerStats, Pattern, Solution

_BASE_DAMP = 0.01  # before scaling, so that inputs that are always zero have a scale


def admm(
    weight: Tensor,
    scores: Tensor,
    keep: IntTensor,
    pattern: Pattern,
    stats: LayerStats,
    *,
    damp: float = 0.1,
    rho: float = 1.0,
    iterations: int = 20,
) -> Solution:
    """Alternates between the weights' best answer to the data and the nearest weights of the asked sparsity.

    With inputs scaled to norm 1 and G damped by `damp`: ``Z = (W + U) M``, ``U += W - Z``,
    ``W = (G + rho I)^-1 (G W0 + rho (Z - U))``. The mask M is chosen anew by ``|W + U|`` in the first three quarters of the
    iterations, while the sparsity rises to the target on a cubic curve, and is held in the last. Like ``sparsegpt`` it
    chooses by itself.

    Source: Boza 2024, Fast and Effective Weight Update for Pruned Large Language Models, algorithms 1 and 2.
    """
    if iterations < 1 or rho <= 0:
        raise RecipeError(f"admm needs iterations >= 1 and rho > 0, got iterations={iterations}, rho={rho}")
    if pattern.whole_outputs:
        return keep_only(weight, scores, keep, pattern, stats)
    problem = Problem(weight, scores, keep, pattern, stats, _BASE_DAMP)
    inverse = _inverse(problem.form.matrix, rho + damp)
    pull = problem.weight @ problem.form.matrix + damp * problem.weight
    current, dual = problem.weight, torch.zeros_like(problem.weight)
    rising = max(1, iterations * 3 // 4)
    units = scores.shape[1] - torch.isneginf(scores).sum(1)
    mask = problem.mask(current)
    for step in range(1, iterations + 1):
        if step <= rising:
            share = 1 - (1 - step / rising) ** 3
            removed = ((units - keep).clamp_min(0) * share).long() if step < rising else units - keep
            mask = problem.mask(current + dual, (units - removed).to(keep.dtype))  # type: ignore[arg-type]
        sparse = (current + dual) * mask
        dual = dual + current - sparse
        current = (pull + rho * (sparse - dual)) @ inverse
    return problem.solution((current + dual) * mask, mask)


@once_for_each_gram
def _inverse(matrix: Tensor, shift: float) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(shift)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))
