"""Least squares on a given mask: exactly, row by row, and approximately for all rows at once."""

from __future__ import annotations

import torch
from torch import BoolTensor, Tensor

from secateur.solvers.fast import fast
from secateur.solvers.fast import product as fast_product

_BYTES = 256 << 20  # of matrices factorised at once
_ROWS = 256  # taken through all steps together: they stay in the processor's cache


def exact(matrix: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The weights nearest in the norm of `matrix` to `weight` that are zero outside `mask`: one Cholesky a row, in float64.

    `matrix` is ``[groups, d, d]`` and positive definite, `weight` and `mask` ``[groups, rows, d]``. With kept K and removed P
    of a row the answer is ``w_K + H_KK^-1 H_KP w_P``.
    """
    result = torch.zeros_like(weight, dtype=torch.float64)
    for group in range(len(matrix)):
        form = matrix[group].double()
        most = int(mask[group].sum(1).max()) if mask[group].numel() else 0
        step = max(1, _BYTES // (8 * most * most + 1))
        for rows in torch.arange(weight.shape[1]).split(step):
            result[group, rows] = _rows(form, weight[group, rows].double(), mask[group, rows], most)
    return result.to(weight.dtype)


def _rows(form: Tensor, weight: Tensor, mask: Tensor, most: int) -> Tensor:
    """`exact` for a few rows: kept indices come first; rows that keep fewer than `most` are filled up with the identity."""
    order = mask.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    real = mask.gather(1, order)
    matrices = form[order[:, :, None], order[:, None, :]]
    matrices = matrices * (real[:, :, None] & real[:, None, :])
    matrices.diagonal(dim1=1, dim2=2).add_((~real).double())
    side = ((weight * ~mask) @ form).gather(1, order) * real
    moved = torch.cholesky_solve(side[..., None], torch.linalg.cholesky(matrices))[..., 0]
    result = torch.where(mask, weight, 0)
    return result.scatter_add(1, order, moved * real)


def conjugate_gradients(matrix: Tensor, weight: Tensor, start: Tensor, mask: BoolTensor | Tensor, steps: int) -> Tensor:
    """`steps` of conjugate gradients towards `exact`, from `start`: one product of the whole weight with the matrix each.

    Every row is a system of its own, with Jacobi's preconditioner. The residual at the start is exact to float32; within the
    steps products are `fast`. Source: Meng et al. 2024, ALPS, algorithm 2.
    """
    result = torch.where(mask, start, 0)
    if steps == 0:
        return result
    for group, form in enumerate(matrix):
        rough, inverse = fast(form), 1 / form.diagonal()
        for a in range(0, weight.shape[1], _ROWS):
            rows = slice(a, a + _ROWS)
            _descend(result[group, rows], weight[group, rows], mask[group, rows].to(form.dtype), form, rough, inverse, steps)
    return result


def _descend(result: Tensor, weight: Tensor, mask: Tensor, form: Tensor, rough: Tensor, inverse: Tensor, steps: int) -> None:
    """`conjugate_gradients` for a few rows, in place."""
    residual = ((weight - result) @ form).mul_(mask)
    ahead = residual * inverse
    direction, product = ahead, (residual * ahead).sum(1, keepdim=True)
    for step in range(steps):
        image = fast_product(direction, rough).mul_(mask)
        length = _ratio(product, (direction * image).sum(1, keepdim=True))
        result.addcmul_(length, direction)
        if step + 1 < steps:
            residual.addcmul_(length, image, value=-1)
            ahead = residual * inverse
            before, product = product, (residual * ahead).sum(1, keepdim=True)
            direction = torch.addcmul(ahead, _ratio(product, before), direction)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """``above / below``, 0 where a row is solved already."""
    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0)
