"""CHITA: the loss's quadratic model under a count of weights, without ever forming its matrix."""

from __future__ import annotations

import torch
from torch import BoolTensor, IntTensor, Tensor

from secateur.errors import RecipeError
from secateur.solvers.keep import keep as keep_only
from secateur.solvers.units import best, gone
from secateur.types import LayerStats, Need, Pattern, Solution

_STAGES = 5  # values of the penalty: each costs a factorisation of [rows, rows]
_RISE = 1.5  # one penalty over the one before
_FIRST = 0.3  # the first penalty, of the mean diagonal of A^T A


def chita(
    weight: Tensor,
    scores: Tensor,
    keep: IntTensor,
    pattern: Pattern,
    stats: LayerStats,
    *,
    damp: float = 0.1,
    first_order: float = 0.0,
    iterations: int = 20,
) -> Solution:
    """Minimises ``|A (w - w0)|^2 / 2n + f g^T (w - w0) + l |w - w0|^2 / 2`` with as many weights as asked for.

    The rows of A are n gradients of the calibration loss, of samples or of small groups of them, and l is `damp` times the
    mean diagonal of ``A^T A / n``. `g` is the mean gradient and f is `first_order`: 0 by default, as a network at its
    optimum has no gradient and that of a few samples misleads. In many steps, whose gradients are taken anew after each,
    this is what the paper calls CHITA++: ``schedule = {name = "cubic", initial = 0.3}`` and ``steps = 16`` or more.

    The support is searched by ADMM from the largest weights, with the penalty in five steps from .3 to 1.5 of the mean
    diagonal; the weights on it are then exact. All goes through matrices ``[n, n]`` by Woodbury's identity. The paper
    searches by hard thresholding with a line search, which seldom leaves the support it starts from, and takes small
    networks as one block where we take each layer.

    Source: Benbaki et al. 2023, Fast as CHITA (the problem, weights on a support by Woodbury, stages).
    """
    if iterations < 1 or damp <= 0:
        raise RecipeError(f"chita needs iterations >= 1 and damp > 0, got iterations={iterations}, damp={damp}")
    if pattern.whole_outputs:
        return keep_only(weight, scores, keep, pattern, stats)
    problem = _Problem(weight, scores, keep, pattern, stats, damp, first_order)
    if problem.level == 0:
        mask = problem.largest(problem.start)
        note = f"every gradient of {stats.name!r} is zero: its largest weights were kept as they are"
        return Solution(mask, torch.where(mask, weight, 0), (note,))
    return problem.solution(problem.support(iterations))


class _Problem:
    """One layer's problem on the weights that are left: ``start [p]``, ``rows [n, p]``, and the residual ``pull [n]``."""

    def __init__(
        self, weight: Tensor, scores: Tensor, keep: IntTensor, pattern: Pattern, stats: LayerStats, damp: float, first: float
    ):
        self._removed, self._keep, self._pattern = gone(scores, pattern, weight.shape), keep, pattern
        self._alive = (~self._removed).reshape(-1)
        self.rows = stats.need(Need.GRAD_SAMPLES).flatten(1)[:, self._alive]
        self.start = weight.float().reshape(-1)[self._alive]
        count = len(self.rows)
        self.level = float(self.rows.square().sum(dtype=torch.float64)) / max(1, self.rows.shape[1])
        self.ridge = damp * self.level
        samples = stats.row_samples.to(self.rows) if stats.row_samples is not None else torch.ones(count)
        self.pull = -first * samples.sqrt() * count / samples.sum()

    def largest(self, values: Tensor) -> BoolTensor:
        """Of the whole weight: the units whose values, squared and summed, are most."""
        return best(self._whole(values.square()), self._keep, self._pattern, self._removed)

    def mask(self, values: Tensor) -> BoolTensor:
        """As `largest`, of the weights left."""
        return self.largest(values).reshape(-1)[self._alive]  # type: ignore[return-value]

    def support(self, iterations: int) -> BoolTensor:
        """The mask that ADMM settles on."""
        square = (self.rows @ self.rows.t()).double()
        dual = torch.zeros_like(self.start)
        mask = self.mask(self.start)
        sparse = self.start * mask
        for stage in range(_STAGES):
            rho = _FIRST * _RISE**stage * self.level
            factor = _factor(square, self.ridge + rho)
            for _ in range(iterations * stage // _STAGES, iterations * (stage + 1) // _STAGES):
                base = (self.ridge * self.start + rho * (sparse - dual)) / (self.ridge + rho)
                residual = self.pull - self.rows @ (base - self.start)
                current = base + self.rows.t() @ _solve(factor, residual)
                mask = self.mask(current + dual)
                sparse = (current + dual) * mask
                dual = dual + current - sparse
            dual = dual / _RISE
        return mask

    def solution(self, mask: BoolTensor) -> Solution:
        """The best weights on `mask`."""
        kept = self.rows[:, mask]
        residual = self.pull + self.rows[:, ~mask] @ self.start[~mask]
        factor = _factor((kept @ kept.t()).double(), self.ridge)
        values = torch.zeros_like(self.start)
        values[mask] = self.start[mask] + kept.t() @ _solve(factor, residual)
        whole: BoolTensor = torch.zeros_like(self._removed)  # type: ignore[assignment]
        whole.view(-1)[self._alive] = mask
        return Solution(whole, self._whole(values))

    def _whole(self, values: Tensor) -> Tensor:
        result = torch.zeros(self._removed.shape, device=values.device)
        result.view(-1)[self._alive] = values
        return result


def _factor(square: Tensor, ridge: float) -> Tensor:
    matrix = square.clone()
    matrix.diagonal().add_(ridge)
    return torch.linalg.cholesky(matrix)


def _solve(factor: Tensor, side: Tensor) -> Tensor:
    return torch.cholesky_solve(side.double()[:, None], factor)[:, 0].float()
