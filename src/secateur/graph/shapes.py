"""Shapes of the commonest operations, worked out here: a hundred times faster than torch does for tensors without values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Shape, strides and type of a tensor.
Like = tuple[Sequence[int], Sequence[int], torch.dtype]


def contiguous(shape: Sequence[int], dtype: torch.dtype) -> Like:
    """A tensor whose last index runs fastest."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(shape), tuple(reversed(strides)), dtype


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *_: Any) -> list[Like] | None:
    if not x.is_contiguous():
        return None
    kept = contiguous((x.shape[1] if training else 0,), x.dtype)
    return [contiguous(x.shape, x.dtype), kept, kept]


def _convolution(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, extra: Any, groups: int
) -> list[Like] | None:
    n = weight.dim() - 2
    if not x.is_contiguous() or x.dim() != weight.dim() or x.dtype != weight.dtype:
        return None
    stride, padding, dilation, extra = ((*v, *[v[-1]] * (n - len(v))) for v in (stride, padding, dilation, extra))
    sizes = []
    for d in range(n):
        reach = dilation[d] * (weight.shape[2 + d] - 1)
        if transposed:
            sizes.append((x.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + reach + extra[d] + 1)
        else:
            sizes.append((x.shape[2 + d] + 2 * padding[d] - reach - 1) // stride[d] + 1)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    if (not transposed and x.shape[1] != weight.shape[1] * groups) or min(sizes) < 1:
        return None  # torch says what is wrong
    return [contiguous((x.shape[0], channels, *sizes), x.dtype)]


def _layer_norm(x: Tensor, over: Sequence[int], *_: Any) -> list[Like]:
    statistics = contiguous((*x.shape[: x.dim() - len(over)], *[1] * len(over)), x.dtype)
    return [contiguous(x.shape, x.dtype), statistics, statistics]


def _alike(x: Tensor, *others: Any, **_: Any) -> list[Like] | None:
    """Of tensors that are alike in everything, one more."""
    for other in others:
        if isinstance(other, Tensor) and (other.shape != x.shape or other.dtype != x.dtype or other.stride() != x.stride()):
            return None
    return [contiguous(x.shape, x.dtype)] if x.is_contiguous() and x.is_floating_point() else None


_ATEN = torch.ops.aten
SHAPES: dict[Any, Callable[..., list[Like] | None]] = {
    _ATEN.native_batch_norm.default: _batch_norm,
    _ATEN.native_layer_norm.default: _layer_norm,
    _ATEN.convolution.default: _convolution,
    _ATEN.add.Tensor: _alike,
    _ATEN.mul.Tensor: _alike,
    _ATEN.relu.default: _alike,
    _ATEN.silu.default: _alike,
    _ATEN.gelu.default: _alike,
    _ATEN.sigmoid.default: _alike,
    _ATEN.hardswish.default: _alike,
    _ATEN._softmax.default: lambda x, dim, half: None if half else _alike(x),
}

#: In-place operations that leave the shape as it is: without values there is nothing to do.
IN_PLACE = frozenset(
    {
        "add_",
        "mul_",
        "sub_",
        "div_",
        "relu_",
        "silu_",
        "hardswish_",
        "hardtanh_",
        "clamp_",
        "sigmoid_",
        "masked_fill_",
        "zero_",
        "copy_",
        "fill_",
        "leaky_relu_",
        "elu_",
        "hardsigmoid_",
        "clamp_min_",
    }
)
