"""ALPS: ADMM with a rising penalty until the support stands still, then conjugate gradients on it."""

from __future__ import annotations

import torch
from torch import IntTensor, Tensor

from secateur.errors import RecipeError
from secateur.quadratic import once_for_each_gram
from secateur.solvers import refit
from secateur.solvers.keep import keep as keep_only
from secateur.solvers.scaled import Problem
from secateur.types import LayerStats, Pattern, Solution

_EVERY = 3  # iterations between two looks at the support
#: Share of the kept weights whose place changed -> factor of the penalty (the paper's schedule).
_FACTORS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def alps(
    weight: Tensor,
    scores: Tensor,
    keep: IntTensor,
    pattern: Pattern,
    stats: LayerStats,
    *,
    damp: float = 0.01,
    rho: float = 0.1,
    iterations: int = 300,
    refine: int = 10,
) -> Solution:
    """L0-constrained least squares by ADMM: choice and repair of the weights inform each other until the choice is stable.

    With inputs scaled to norm 1: ``W = (G + rho I)^-1 (G W0 - V + rho D)``, D the nearest weights of the asked sparsity to
    ``W + V / rho``, ``V += rho (W - D)``. Every third iteration the penalty `rho` grows by 1.3, 1.2 or 1.1 as more than a
    tenth, more than half a percent or any of the kept weights moved; none ends it. Then `refine` steps of conjugate
    gradients on the support. One eigendecomposition serves every `rho`, and every layer that shares the input.

    Source: Meng et al. 2024, ALPS: Improved Optimization for Highly Sparse One-Shot Pruning, algorithms 1 and 2.
    """
    if iterations < 1 or rho <= 0 or refine < 0:
        raise RecipeError(f"alps needs iterations >= 1, rho > 0 and refine >= 0, got {iterations}, {rho}, {refine}")
    if pattern.whole_outputs:
        return keep_only(weight, scores, keep, pattern, stats)
    problem = Problem(weight, scores, keep, pattern, stats, damp)
    values, vectors = _eigen(problem.form.matrix)
    # In the basis of the eigenvectors the matrix is its eigenvalues: W0 and V are kept there, only W and D come back.
    pull = (problem.weight @ vectors) * values
    dual = torch.zeros_like(pull)
    mask = looked_at = problem.mask(problem.weight)
    turned = problem.weight @ vectors
    notes: tuple[str, ...] = (f"alps stopped after {iterations} iterations on {stats.name!r} before its support stood still",)
    for step in range(1, iterations + 1):
        dense = (pull - dual + rho * turned) / (values + rho)
        target = dense + dual / rho
        back = target @ vectors.transpose(1, 2)
        mask = problem.mask(back)
        sparse = back * mask
        turned = sparse @ vectors
        dual = rho * (target - turned)
        if step % _EVERY == 0:
            moved = int((mask ^ looked_at).sum())
            if moved == 0:
                notes = ()
                break
            looked_at = mask
            rho *= next(factor for share, factor in _FACTORS if moved >= share * int(mask.sum()))
    found = refit.conjugate_gradients(problem.form.matrix, problem.weight, sparse, mask, refine)
    solution = problem.solution(found, mask)
    return Solution(solution.mask, solution.weight, (*solution.notes, *notes))


@once_for_each_gram
def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[groups, 1, d]`` and eigenvectors ``[groups, d, d]``."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_min(0)[:, None, :], vectors
