"""Shapes of the commonest operations, worked out here: a hundred times faster than torch does for tensors without values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Shape, strides and type of a tensor.
Like = tuple[Sequence[int], Sequence[int], torch.dtype]


@functools.lru_cache(maxsize=4096)
def _packed(shape: tuple[int, ...], dtype: torch.dtype) -> Like:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return shape, tuple(reversed(strides)), dtype


def contiguous(shape: Sequence[int], dtype: torch.dtype) -> Like:
    """A tensor whose last index runs fastest."""
    return _packed(tuple(shape), dtype)


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
    """Of packed tensors of one type that broadcast to the first, one more like it."""
    if not (x.is_contiguous() and x.is_floating_point()):
        return None
    shape = x.shape
    for other in others:
        if isinstance(other, Tensor):
            if other.dtype != x.dtype or not other.is_contiguous():
                return None
            if other.shape != shape and not _broadcasts(other.shape, shape):
                return None
        elif not isinstance(other, (int, float, str)):
            return None
    return [contiguous(shape, x.dtype)]


def _broadcasts(small: Sequence[int], shape: Sequence[int]) -> bool:
    return len(small) <= len(shape) and all(a in (1, b) for a, b in zip(reversed(small), reversed(shape), strict=False))


def _masked_fill(x: Tensor, mask: Tensor, value: Any) -> list[Like] | None:
    fits = x.is_contiguous() and mask.is_contiguous() and _broadcasts(mask.shape, x.shape)
    return [contiguous(x.shape, x.dtype)] if fits and isinstance(value, (int, float)) else None


def _mm(a: Tensor, b: Tensor) -> list[Like] | None:
    fits = a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] and a.dtype == b.dtype
    return [contiguous((a.shape[0], b.shape[1]), a.dtype)] if fits else None


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **scales: Any) -> list[Like] | None:
    out = _mm(a, b)
    fits = out is not None and bias.dtype == a.dtype and _broadcasts(bias.shape, out[0][0])
    return out if fits else None


def _bmm(a: Tensor, b: Tensor) -> list[Like] | None:
    fits = a.dim() == b.dim() == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1] and a.dtype == b.dtype
    return [contiguous((*a.shape[:2], b.shape[2]), a.dtype)] if fits else None


def _mean(x: Tensor, dims: Any, keepdim: bool = False, **kwargs: Any) -> list[Like] | None:
    if kwargs or not dims or not x.is_contiguous() or not x.is_floating_point():
        return None
    gone = {d % x.dim() for d in dims}
    if keepdim:
        return [contiguous([1 if d in gone else n for d, n in enumerate(x.shape)], x.dtype)]
    return [contiguous([n for d, n in enumerate(x.shape) if d not in gone], x.dtype)]


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> list[Like] | None:
    first = tensors[0]
    dim = dim % first.dim() if first.dim() else 0
    rest = [n for d, n in enumerate(first.shape) if d != dim]
    for t in tensors:
        if t.dtype != first.dtype or not t.is_contiguous() or t.dim() != first.dim() or not t.dim():
            return None
        if [n for d, n in enumerate(t.shape) if d != dim] != rest:
            return None
    shape = list(first.shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return [contiguous(shape, first.dtype)]


def _view(x: Tensor, shape: Sequence[int]) -> list[Like] | None:
    if not x.is_contiguous():
        return None
    known = math.prod(n for n in shape if n != -1)
    if -1 in shape and known > 0:
        shape = [x.numel() // known if n == -1 else n for n in shape]
    return [contiguous(shape, x.dtype)] if -1 not in shape and math.prod(shape) == x.numel() else None


def _expand(x: Tensor, shape: Sequence[int], **_: Any) -> list[Like] | None:
    new = len(shape) - x.dim()
    sizes, strides = list(shape), [0] * len(shape)
    for d, (n, step) in enumerate(zip(x.shape, x.stride(), strict=True), new):
        if shape[d] in (-1, n):
            sizes[d], strides[d] = n, step
        elif n != 1:
            return None
    return [(sizes, strides, x.dtype)] if min(sizes, default=0) >= 0 else None


def _permute(x: Tensor, order: Sequence[int]) -> list[Like]:
    shape, strides = x.shape, x.stride()
    return [([shape[d] for d in order], [strides[d] for d in order], x.dtype)]


def _transpose(x: Tensor, a: int, b: int) -> list[Like]:
    order = list(range(x.dim()))
    order[a], order[b] = order[b], order[a]
    return _permute(x, order)


def _copy(x: Tensor, **kwargs: Any) -> list[Like] | None:
    packed = kwargs.get("memory_format") == torch.contiguous_format or x.is_contiguous()
    return [contiguous(x.shape, x.dtype)] if packed else None


def _same_type(x: Tensor, *_: Any) -> list[Like] | None:
    return [contiguous(x.shape, x.dtype)] if x.is_contiguous() else None


def _empty(
    shape: Sequence[int], *, dtype: Any = None, memory_format: Any = None, layout: Any = None, **_: Any
) -> list[Like] | None:
    plain = memory_format in (None, torch.contiguous_format) and layout in (None, torch.strided)
    return [contiguous(shape, dtype or torch.get_default_dtype())] if plain else None


_ATEN = torch.ops.aten
SHAPES: dict[Any, Callable[..., list[Like] | None]] = {
    _ATEN.native_batch_norm.default: _batch_norm,
    _ATEN.native_layer_norm.default: _layer_norm,
    _ATEN.convolution.default: _convolution,
    _ATEN.empty.memory_format: _empty,
    _ATEN.add.Tensor: _alike,
    _ATEN.sub.Tensor: _alike,
    _ATEN.mul.Tensor: _alike,
    _ATEN.div.Tensor: _alike,
    _ATEN.pow.Tensor_Scalar: lambda x, power: _alike(x) if isinstance(power, (int, float)) else None,
    _ATEN.relu.default: _alike,
    _ATEN.silu.default: _alike,
    _ATEN.gelu.default: _alike,
    _ATEN.sigmoid.default: _alike,
    _ATEN.tanh.default: _alike,
    _ATEN.rsqrt.default: _alike,
    _ATEN.neg.default: _alike,
    _ATEN.hardswish.default: _alike,
    _ATEN._softmax.default: lambda x, dim, half: None if half else _alike(x),
    _ATEN.masked_fill.Scalar: _masked_fill,
    _ATEN.mm.default: _mm,
    _ATEN.addmm.default: _addmm,
    _ATEN.bmm.default: _bmm,
    _ATEN.mean.dim: _mean,
    _ATEN.cat.default: _cat,
    _ATEN.roll.default: _same_type,
    _ATEN.clone.default: _copy,
    _ATEN.view.default: _view,
    _ATEN._unsafe_view.default: _view,
    _ATEN.expand.default: _expand,
    _ATEN.permute.default: _permute,
    _ATEN.transpose.int: _transpose,
    _ATEN.t.default: lambda x: _permute(x, range(x.dim() - 1, -1, -1)),
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
