"""The quadratic form of a layer's output error, and its factorisations: what every second-order solver works with.

For a weight with rows ``w`` and inputs ``X`` the squared error of the output after a change ``d`` of a row is ``d G d^T`` with
the Gram matrix ``G = X X^T``. Matrices are ``[groups, d, d]`` as in `LayerStats.gram`, weights ``[groups, rows, d]``.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from secateur.errors import LayerError, NonFiniteError

log = logging.getLogger("secateur")
F = TypeVar("F", bound=Callable[..., Any])
_HARDER = (1.0, 10.0, 100.0)  # damping tried one after the other where a factorisation fails
_BLOCK = 128  # columns that `reverse_cholesky` takes at a time


def by_group(weight: Tensor, gram: Tensor) -> Tensor:
    """A canonical weight ``[out, in, *kernel]`` as float32 ``[groups, out / groups, in * kernel]``."""
    groups, width = gram.shape[:2]
    if weight.shape[0] % groups or weight[0].numel() != width:
        raise LayerError(f"a Gram matrix of shape {tuple(gram.shape)} does not belong to a weight {tuple(weight.shape)}")
    return weight.float().reshape(groups, -1, width)


def output_error(gram: Tensor, before: Tensor, after: Tensor) -> float:
    """Relative output error ``||(W' - W) X||^2 / ||W X||^2`` of canonical weights; 0 where neither has an output.

    Example:
        >>> output_error(torch.eye(2)[None], torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]]))
        0.36
    """
    old, new = by_group(before, gram), by_group(after, gram)
    change = new - old
    lost = float(((change @ gram) * change).sum(dtype=torch.float64))
    whole = float(((old @ gram) * old).sum(dtype=torch.float64))
    return round(max(lost, 0.0) / whole, 12) if whole > 0 else 0.0


class Factor(NamedTuple):
    """A factorisation of the damped matrix, and what had to be done for it."""

    matrix: Tensor  #: the damped matrix
    lower: Tensor  #: ``L`` with ``L L^T = matrix``
    notes: tuple[str, ...]


def damped(gram: Tensor, damp: float) -> Tensor:
    """``G + damp * mean(diag G) I``; a group without any input gets the identity, which ranks weights by magnitude."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)
    extra = torch.where(mean > 0, damp * mean, torch.ones_like(mean))
    result = gram.clone()
    result.diagonal(dim1=1, dim2=2).add_(extra[:, None])
    return result


def checked(gram: Tensor, damp: float, name: str) -> tuple[Tensor, tuple[str, ...]]:
    """`damped`, and what there is to say of it: for solvers that factorise something better conditioned themselves.

    Raises NonFiniteError, naming the layer, for NaN or infinite values.
    """
    _check_finite(gram, name)
    return damped(gram, damp), tuple(_dead(gram, name))


def cholesky(gram: Tensor, damp: float, name: str) -> Factor:
    """Cholesky factor of the damped matrix. Where it fails it is damped 10 and 100 times harder, then done in float64.

    Whatever was not the plain way is in the notes. Raises NonFiniteError for a matrix with NaN or infinite values, LayerError
    for one that is not positive semidefinite at all; both name the layer.
    """
    return _until_it_succeeds(torch.linalg.cholesky_ex, gram, damp, name)


def reverse_cholesky(gram: Tensor, damp: float, name: str) -> Factor:
    """As `cholesky`, but `lower` holds the upper triangular ``R`` with ``R R^T`` the damped matrix.

    Its inverse is the upper Cholesky factor of the inverse, which SparseGPT is written with, at a quarter of the work.
    """
    return _until_it_succeeds(_reverse, gram, damp, name)


def _until_it_succeeds(factorise: Callable[[Tensor], tuple[Tensor, Tensor]], gram: Tensor, damp: float, name: str) -> Factor:
    _check_finite(gram, name)
    notes = _dead(gram, name)
    for dtype in (torch.float32, torch.float64):
        for harder in _HARDER:
            matrix = damped(gram.to(dtype), max(damp, 1e-8) * harder if harder > 1 else damp)
            triangle, info = factorise(matrix)
            if not bool(info.any()) and bool(torch.isfinite(triangle.sum())):
                if harder > 1 or dtype == torch.float64:
                    how = f"damped {harder:g} times harder" if harder > 1 else "not damped harder"
                    notes.append(f"the Gram matrix of {name!r} is close to singular: it was {how} and factorised in {dtype}")
                return Factor(matrix, triangle, tuple(notes))
    raise LayerError(
        f"the Gram matrix of {name!r} is not positive semidefinite, even damped by {damp * _HARDER[-1]:g} of its mean "
        "diagonal: give more calibration data, or take solver 'keep' for it"
    )


def _reverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Upper triangular ``R`` with ``R R^T = matrix``, and for each matrix 0 where it succeeded, as ``cholesky_ex``.

    Blocks of columns from the last to the first, each less the products of those behind it: nearly all of the work is in
    matrix products, which are faster than one factorisation of the whole matrix turned round.
    """
    result = torch.zeros_like(matrix)
    failed = torch.zeros(len(matrix), dtype=torch.int32, device=matrix.device)
    for stop in range(matrix.shape[1], 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        behind = result[:, :stop, stop:]
        panel = torch.baddbmm(matrix[:, :stop, start:stop], behind, behind[:, start:].transpose(1, 2), alpha=-1)
        turned, info = torch.linalg.cholesky_ex(panel[:, start:].flip(1, 2))
        failed |= info
        corner = turned.flip(1, 2)
        result[:, start:stop, start:stop] = corner
        if start:
            above = torch.linalg.solve_triangular(corner.transpose(1, 2), panel[:, :start], upper=False, left=False)
            result[:, :start, start:stop] = above
    return result, failed


def _check_finite(gram: Tensor, name: str) -> None:
    if not bool(torch.isfinite(gram.sum())):
        raise NonFiniteError(f"the Gram matrix of {name!r} holds NaN or infinite values: check the calibration data")


def _dead(gram: Tensor, name: str) -> list[str]:
    diagonal = gram.diagonal(dim1=1, dim2=2)
    dead = int((diagonal <= 0).sum())
    if not dead:
        return []
    if dead == diagonal.numel():
        return [f"no input of {name!r} was ever other than zero: nothing tells which of its weights matter"]
    return [f"{dead} of {diagonal.numel()} inputs of {name!r} were always zero: their weights go first, unrepaired"]


def once_for_each_gram(function: F) -> F:
    """Keep the last result of ``function(gram, *hashable)`` while that tensor lives: layers that share it share the work."""
    last: dict[str, Any] = {}

    @functools.wraps(function)
    def cached(gram: Tensor, *args: Any) -> Any:
        if last and last["gram"]() is gram and last["key"] == (gram._version, args):
            return last["value"]
        value = function(gram, *args)
        last.update(gram=weakref.ref(gram, lambda _: last.clear()), key=(gram._version, args), value=value)
        return value

    return cached  # type: ignore[return-value]
