"""Operations that work on each index alone: labels of dimensions that broadcast against each other are tied."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.graph.rules import rule
from secateur.graph.trace import Value

if TYPE_CHECKING:
    from secateur.graph.couple import Coupler
    from secateur.graph.labels import Dim
    from secateur.graph.trace import Node

_NAMES = """
    add sub rsub mul div floor_divide remainder fmod pow float_power maximum minimum fmax fmin atan2 copysign hypot lerp
    addcmul addcdiv abs neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square sign sgn floor ceil round
    trunc frac sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc erfinv lgamma digamma sigmoid logit
    logaddexp logaddexp2 xlogy relu relu6 leaky_relu elu selu celu gelu silu mish hardtanh hardsigmoid hardswish
    softplus hardshrink softshrink threshold log_sigmoid_forward rrelu_with_noise clamp clamp_min clamp_max nan_to_num
    eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor
    __and__ __or__ __xor__ __lshift__ __rshift__ bitwise_left_shift bitwise_right_shift isnan isinf isfinite where
    masked_fill alias clone detach contiguous _to_copy to copy dropout native_dropout
    alpha_dropout feature_dropout fill zero positive real imag conj _conj resolve_conj resolve_neg view_as
    _fused_dropout _autocast_to_reduced_precision _autocast_to_full_precision bernoulli normal uniform exponential
    complex polar angle ones_like zeros_like full_like empty_like rand_like randn_like view_dtype _conj_physical
    conj_physical prelu _prelu_kernel nextafter gcd lcm heaviside isin to_dtype _assert_async _assert_scalar trunc_
    floor_ masked_fill_ logical_not_
"""


def broadcast(c: Coupler, node: Node, inputs: list[Value], shape: tuple[int, ...]) -> list[Dim]:
    """Labels of a result of `shape` to which `inputs` broadcast; dimensions of one size are tied."""
    out: list[Dim] = [None] * len(shape)
    for d, n in enumerate(shape):
        if n == 1:
            continue
        dims = []
        for value in inputs:
            own = d - len(shape) + value.ndim
            if own >= 0 and value.shape[own] == n:
                dims.append(c.labels_of(value)[own])
        if not dims:
            continue
        first = dims[0]
        for other in dims[1:]:
            first = c.tie(first, other, node, "it is combined with a dimension that cannot be cut")
        out[d] = first
    return out


@rule(*dict.fromkeys(n.rstrip("_") if not n.startswith("__") else n for n in _NAMES.split()))
def elementwise(c: Coupler, node: Node) -> list[list[Dim]]:
    """Same index in, same index out."""
    inputs = node.tensors
    if node.name == "prelu" and len(inputs) == 2:
        return [_prelu(c, node, *inputs)]
    joins = node.name == "add" and _joins(c, inputs)
    labels = [broadcast(c, node, inputs, out.shape) for out in node.outputs]
    if joins:
        c.mark(labels[0][-1], "width")
    return labels


def _joins(c: Coupler, inputs: list[Value]) -> bool:
    """Whether this sum is the first thing that two computed tensors have to do with each other: a residual stream."""
    if len(inputs) != 2 or any(c.is_weight(v) or v.ndim < 2 for v in inputs):
        return False
    a, b = (c.labels_of(v)[-1] for v in inputs)
    return a is not None and b is not None and len(a) == len(b) and bool((c.labels.find(a) != c.labels.find(b)).any())


@rule("index_fill", "masked_scatter")
def opaque_in_place(c: Coupler, node: Node) -> None:
    """Depends on positions: nothing can be cut."""
    c.freeze_all(node)


def _prelu(c: Coupler, node: Node, x: Value, slope: Value) -> list[Dim]:
    labels = list(c.labels_of(x))
    if slope.ndim == 1 and slope.shape[0] > 1 and x.ndim > 1:
        labels[1] = c.tie(labels[1], c.labels_of(slope)[0], node, "")
    return labels
