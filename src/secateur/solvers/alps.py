"""ALPS: ADMM with a rising penalty, which settles the support, then conjugate gradients on it."""

from __future__ import annotations

import torch
from torch import IntTensor, Tensor

from secateur.errors import RecipeError
from secateur.quadratic import once_for_each_gram
from secateur.solvers import refit
from secateur.solvers.fast import fast, product
from secateur.solvers.keep import keep as keep_only
from secateur.solvers.scaled import Problem
from secateur.types import LayerStats, Pattern, Solution

_STAGES = 4  # values of the penalty
_RISE = 4.0  # last penalty over the first
_ROWS = 256  # rows taken through an iteration together: they stay in the processor's cache


def alps(
    weight: Tensor,
    scores: Tensor,
    keep: IntTensor,
    pattern: Pattern,
    stats: LayerStats,
    *,
    damp: float = 0.01,
    rho: float = 0.15,
    iterations: int = 14,
    refine: int = 4,
) -> Solution:
    """L0-constrained least squares by ADMM: choice and repair of the weights inform each other while the penalty rises.

    With inputs scaled to norm 1: D is the nearest weights of the asked sparsity to ``H = W + U``, ``U = H - D``,
    ``W = W0 + rho (D - U - W0) (G + rho I)^-1``. The penalty goes from `rho` to 4 `rho` in four equal steps of its logarithm,
    and ``rho U`` is kept where it steps. Then `refine` steps of conjugate gradients on the support.

    The paper lets the penalty grow by 1.1 to 1.3 at every third iteration until no weight moves, on one eigendecomposition.
    Here one inverse and its square give all four penalties. What only moves the support on its way is computed in bfloat16
    where the processor multiplies it faster; the last choice is exact, and the last weights are found in float32.

    Source: Meng et al. 2024, ALPS: Improved Optimization for Highly Sparse One-Shot Pruning, algorithms 1 and 2.
    """
    if iterations < 1 or rho <= 0 or refine < 0:
        raise RecipeError(f"alps needs iterations >= 1, rho > 0 and refine >= 0, got {iterations}, {rho}, {refine}")
    if pattern.whole_outputs:
        return keep_only(weight, scores, keep, pattern, stats)
    problem = Problem(weight, scores, keep, pattern, stats, damp)
    pulls = _pulls(problem.form.matrix, rho)
    start = problem.weight
    moved = start.clone()  # W + U
    mask = problem.nearly(moved)
    stages = [iteration * _STAGES // iterations for iteration in range(iterations)]
    for stage, before in zip(stages, [0, *stages], strict=False):
        shrink = _RISE ** ((before - stage) / (_STAGES - 1))
        for group, pull in enumerate(pulls[stage]):
            for a in range(0, start.shape[1], _ROWS):
                rows = slice(a, a + _ROWS)
                _iterate(moved[group, rows], mask[group, rows], start[group, rows], pull, shrink)
        mask = problem.nearly(moved)
    mask = problem.mask(moved)
    return problem.solution(refit.conjugate_gradients(problem.form.matrix, start, moved * mask, mask, refine), mask)


def _iterate(moved: Tensor, mask: Tensor, start: Tensor, pull: Tensor, shrink: float) -> None:
    """One iteration of a few rows in place; `shrink` keeps ``rho U`` where the penalty has stepped."""
    sparse = moved * mask
    dual = (moved - sparse).mul_(shrink)
    sparse.sub_(dual).sub_(start)
    torch.add(start, dual, out=moved).add_(product(sparse, pull))


@once_for_each_gram
def _pulls(matrix: Tensor, rho: float) -> list[Tensor]:
    """``rho' (G + rho' I)^-1`` for every penalty, ``[groups, d, d]`` each, in the type of fast products.

    With p an eigenvalue for the penalty m in the middle, that for ``r m`` is ``r p / (1 + (r - 1) p)``. The parabola through
    it at 0, 1/2 and 1 is off by less than .04 for r from 1/2 to 2, so the middle one and its square are enough.
    """
    middle = rho * _RISE**0.5
    shifted = matrix.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(middle)
    pull = torch.cholesky_inverse(torch.linalg.cholesky(shifted)).mul_(middle)
    square = torch.stack([product(p, fast(p)) for p in pull])
    pulls = []
    between = torch.empty_like(pull)
    for stage in range(_STAGES):
        ratio = _RISE ** (stage / (_STAGES - 1) - 0.5)
        share = 4 * ratio / (1 + ratio) - 1
        pulls.append(fast(torch.lerp(square, pull, share, out=between)))
    return pulls
