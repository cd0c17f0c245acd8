"""Weights as whole numbers times a scale for each output: int8, 4 bits and what lies between, with removed weights at 0.

Scales are chosen to keep the squared error least, on the data's second moments where they are known. With the Gram matrix
of the inputs, rounding is made up for as it happens: the inputs still to come take over each error (Frantar et al. 2023,
GPTQ, equations 2 and 3), and weights that were removed stay removed while their running error is passed on too, which is how
sparsity and few bits go together.

Where nothing but size counts, codes need no largest one: steps are even over all the range and so coarse that entropy coding
takes the bits asked for, which is within a quarter bit of the best that any quantiser does (Gish and Pierce 1968).
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.coding.tensor import Coded
from secateur.errors import RecipeError
from secateur.quadratic import by_group, reverse_cholesky

_NORMAL = 2.047  # entropy in bits of a normal variable, rounded to steps of its standard deviation; half log2(2 pi e)
_SHRINKS = 24  # scales tried, from the one that holds the largest weight down to 0.35 of it
_BLOCK = 64
_LARGEST = 2047  # code that a stream holds
_DAMP = 0.01


def largest(bits: float) -> int:
    """The largest code of `bits`: 127 of 8, 7 of 4, 10 of 4.5. Entropy coding makes use of fractions."""
    if not 1.5 <= bits <= 12:
        raise RecipeError(f"weights take 1.5 to 12 bits as whole numbers, got {bits!r}")
    return max(1, round(2.0 ** (bits - 1)) - 1)


@torch.no_grad()
def quantised(
    weight: Tensor, bits: float | Tensor, *, gram: Tensor | None = None, name: str = "weight", clipped: bool = True
) -> Coded:
    """``weight [out, ...]`` as codes of `bits` with a scale for each output, exact zeros as 0.

    With `clipped`, codes go up to `largest` of `bits`. Without, `bits` is the entropy that the codes of kept weights would have
    if they were normal. A tensor gives the scales themselves, ``[out]``. `gram` ``[groups, d, d]`` is that of the inputs, as
    `LayerStats.gram`; `name` is for messages.

    >>> coded = quantised(torch.tensor([[0.0, 1.0, -0.5, 0.25]]), 8)
    >>> coded.codes.tolist(), coded.values().dtype
    ([[0, 127, -64, 32]], torch.float32)
    """
    half = largest(bits) if clipped and not isinstance(bits, Tensor) else _LARGEST
    grouped = by_group(weight, gram) if gram is not None else weight.detach().float().reshape(1, weight.shape[0], -1)
    weights = None if gram is None else gram.diagonal(dim1=1, dim2=2)[:, None].float()
    if isinstance(bits, Tensor):
        scales = _halved(torch.maximum(bits.to(grouped).reshape(grouped.shape[:2]), grouped.abs().amax(2) / _LARGEST))
    else:
        scales = _scales(grouped, half, weights) if clipped else _steps(grouped, bits)
    if gram is None or grouped.shape[2] == 1:
        codes = (grouped / scales[..., None]).round_().clamp_(-half, half)
    else:
        codes = _swept(grouped, scales, half, gram, name)
    shaped = codes.to(torch.int16).reshape(weight.shape)
    return Coded(shaped, scales.reshape(-1).cpu(), weight.dtype if weight.is_floating_point() else torch.float32)


def _scales(weight: Tensor, half: int, importance: Tensor | None) -> Tensor:
    """``[groups, rows, d]`` -> ``[groups, rows]``, exact in float16: the least squared error of the scales tried."""
    top = weight.abs().amax(2)
    least = torch.full_like(top, torch.inf)
    best = torch.ones_like(top)
    for shrink in torch.linspace(1.0, 0.35, _SHRINKS).tolist():
        scale = _halved(top * (shrink / half))
        change = (weight / scale[..., None]).round_().clamp_(-half, half).mul_(scale[..., None]).sub_(weight).square_()
        error = (change if importance is None else change * importance).sum(2)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return best


def _steps(weight: Tensor, bits: float) -> Tensor:
    """``[groups, rows, d]`` -> ``[groups, rows]``: the step at which normal weights of the rows' sizes have this entropy."""
    kept = weight.count_nonzero(2).clamp(min=1)
    size = (weight.square().sum(2) / kept).sqrt()
    return _halved(torch.maximum(size * 2.0 ** (_NORMAL - bits), weight.abs().amax(2) / _LARGEST))


def _halved(scale: Tensor) -> Tensor:
    """Rounded to float16 and never 0. Rows without a weight get 1."""
    half = scale.clamp(2.0**-24, 65504.0).half().float()
    return torch.where(scale > 0, half, 1.0)


def _swept(weight: Tensor, scales: Tensor, half: int, gram: Tensor, name: str) -> Tensor:
    """Round column after column, the ones with the largest inputs first, and let those to come make up for each error."""
    root, order = sorted_root(gram, name)
    identity = torch.eye(root.shape[1], dtype=root.dtype).expand_as(root)
    upper = torch.linalg.solve_triangular(root, identity, upper=True).float()
    places = order[:, None].expand_as(weight)
    current = weight.gather(2, places).transpose(1, 2).contiguous()  # [groups, d, rows]
    kept = current != 0
    codes = torch.empty_like(current)
    for start in range(0, current.shape[1], _BLOCK):
        stop = min(start + _BLOCK, current.shape[1])
        errors = torch.empty_like(current[:, start:stop])
        for j in range(start, stop):
            found = (current[:, j] / scales).round_().clamp_(-half, half).mul_(kept[:, j])
            codes[:, j] = found
            error = (current[:, j] - found * scales) / upper[:, j, j, None]
            errors[:, j - start] = error
            current[:, j:stop].baddbmm_(upper[:, j, j:stop, None], error[:, None], alpha=-1)
        current[:, stop:].baddbmm_(upper[:, start:stop, stop:].transpose(1, 2), errors, alpha=-1)
    return torch.empty_like(weight).scatter_(2, places, codes.transpose(1, 2))


def sorted_root(gram: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The triangular factor of the damped Gram matrix, inputs sorted from the largest on, and that order ``[groups, d]``."""
    order = gram.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    matrix = gram.gather(1, order[:, :, None].expand_as(gram)).gather(2, order[:, None].expand_as(gram))
    return reverse_cholesky(matrix, _DAMP, name).lower, order


def effective_bits(weight: Tensor, scales: Tensor) -> float:
    """The entropy that whole numbers times `scales` would have on average, if each output's kept weights were normal."""
    rows = weight.detach().float().reshape(len(scales), -1)
    size = (rows.square().sum(1) / rows.count_nonzero(1).clamp(min=1)).sqrt()
    used = size > 0
    return float((_NORMAL + (size[used] / scales.to(size)[used]).log2()).clamp_min(0).mean()) if bool(used.any()) else 0.0
