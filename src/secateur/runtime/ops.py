"""The kernels as torch operators, so that torch.compile and torch.export pass through them without looking inside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.runtime import native
from secateur.runtime.native import Geometry


@torch.library.custom_op("secateur::sparse_linear", mutates_args=())
def sparse_linear(x: Tensor, program: Tensor, bias: Tensor | None, out: int, activation: int) -> Tensor:
    """`native.linear` as an operator: ``x [..., in] -> [..., out]``."""
    return native.linear(x, program, bias, (out, x.shape[-1]), activation)


@torch.library.custom_op("secateur::sparse_matvec", mutates_args=())
def sparse_matvec(x: Tensor, bits: Tensor, bias: Tensor | None, out: int, activation: int) -> Tensor:
    """`native.matvec` as an operator: ``x [..., in] -> [..., out]``."""
    return native.matvec(x, bits, bias, (out, x.shape[-1]), activation)


@torch.library.custom_op("secateur::sparse_conv2d", mutates_args=())
def sparse_conv2d(
    x: Tensor, program: Tensor, bias: Tensor | None, out: int, geometry: Sequence[int], activation: int
) -> Tensor:
    """`native.conv2d` as an operator; `geometry` holds kernel, stride, padding and dilation as eight numbers."""
    return native.conv2d(x, program, bias, (out, x.shape[1]), pairs(geometry), activation)


def pairs(geometry: Sequence[int]) -> Geometry:
    """Eight numbers -> `Geometry`."""
    g = tuple(geometry)
    return Geometry((g[0], g[1]), (g[2], g[3]), (g[4], g[5]), (g[6], g[7]))


@sparse_linear.register_fake
def _(x: Tensor, program: Tensor, bias: Tensor | None, out: int, activation: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


@sparse_matvec.register_fake
def _(x: Tensor, bits: Tensor, bias: Tensor | None, out: int, activation: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


@sparse_conv2d.register_fake
def _(x: Tensor, program: Tensor, bias: Tensor | None, out: int, geometry: Sequence[int], activation: int) -> Tensor:
    return x.new_empty(x.shape[0], out, *pairs(geometry).output(x.shape[2], x.shape[3]))
