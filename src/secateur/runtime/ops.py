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
    """`native.conv2d` as an operator; `geometry` holds the ten numbers of `Geometry.numbers`."""
    return native.conv2d(x, program, bias, (out, x.shape[1]), pairs(geometry), activation)


@torch.library.custom_op("secateur::depthwise_conv2d", mutates_args=())
def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int], activation: int) -> Tensor:
    """`native.depthwise` as an operator; `geometry` holds the ten numbers of `Geometry.numbers`."""
    return native.depthwise(x, weight, bias, pairs(geometry), activation)


def pairs(geometry: Sequence[int]) -> Geometry:
    """The inverse of `Geometry.numbers`."""
    g = tuple(geometry)
    return Geometry(*((g[i], g[i + 1]) for i in range(0, 10, 2)))  # type: ignore[arg-type]


@sparse_linear.register_fake
def _(x: Tensor, program: Tensor, bias: Tensor | None, out: int, activation: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


@sparse_matvec.register_fake
def _(x: Tensor, bits: Tensor, bias: Tensor | None, out: int, activation: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


@sparse_conv2d.register_fake
def _(x: Tensor, program: Tensor, bias: Tensor | None, out: int, geometry: Sequence[int], activation: int) -> Tensor:
    return x.new_empty(x.shape[0], out, *pairs(geometry).output(x.shape[2], x.shape[3]))


@depthwise_conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int], activation: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *pairs(geometry).output(x.shape[2], x.shape[3]))
