"""Operations that sum over one dimension of a weight and give another: matrix products, convolutions, recurrences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from secateur.graph.rules import nothing, rule
from secateur.graph.trace import Value

if TYPE_CHECKING:
    from secateur.graph.couple import Coupler
    from secateur.graph.labels import Dim
    from secateur.graph.trace import Node

_SUM = "it is summed against a dimension that cannot be cut"


@rule("mm", "bmm", "matmul", "dot", "mv", "_int_mm")
def product(c: Coupler, node: Node) -> list[list[Dim]]:
    """``[..., i, k] x [..., k, j] -> [..., i, j]``."""
    return [_product(c, node, node.args[0], node.args[1])]


@rule("addmm", "baddbmm", "addmv", "addbmm")
def product_added(c: Coupler, node: Node) -> list[list[Dim]] | None:
    """A matrix product added to a tensor that broadcasts to it."""
    if node.name == "addbmm":
        c.freeze_all(node)
        return None
    bias, a, b = node.args[:3]
    out = _product(c, node, a, b)
    if bias.ndim == 1 and bias.shape[0] == node.outputs[0].shape[-1]:
        c.adopt(bias, 0, out[-1])
    own = c.labels_of(bias)
    for d in range(1, bias.ndim + 1):
        if bias.shape[-d] == node.outputs[0].shape[-d]:
            out[-d] = c.tie(out[-d], own[-d], node, "what is added to it cannot be cut")
    return [out]


def _product(c: Coupler, node: Node, a: Value, b: Value) -> list[Dim]:
    left, right = list(c.labels_of(a)), list(c.labels_of(b))
    inner = left.pop()
    other = right.pop(0) if b.ndim <= 2 else right.pop(-2)
    activations = not (c.is_weight(a) or c.is_weight(b))
    c.contract(a, inner, other, node, activations=activations)
    if a.ndim == 3 and b.ndim == 3:
        batch = c.tie(left[0], right[0], node, "")
        if activations:
            c.mark(batch, "head")
            c.mark(right[-1], "head_dim")
        return [batch, left[1], right[1]]
    return left + right


@rule("linear")
def linear(c: Coupler, node: Node) -> list[list[Dim]]:
    """``x @ weight.T + bias``."""
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    labels = list(c.labels_of(x))
    c.adopt(weight, 1, labels[-1])
    out, inner = c.labels_of(weight)
    c.contract(x, labels[-1], inner, node)
    if bias is not None:
        c.adopt(bias, 0, out)
        out = c.tie(out, c.labels_of(bias)[0], node, "its bias cannot be cut")
    return [[*labels[:-1], out]]


@rule("convolution", "_convolution", "conv1d", "conv2d", "conv3d", "mkldnn_convolution", "convolution_overrideable")
def convolution(c: Coupler, node: Node) -> list[list[Dim]]:
    """Convolutions of any dimension, grouped, depthwise and transposed."""
    x, weight, bias = node.args[:3]
    transposed, groups = bool(node.args[6]), int(node.args[8])
    channels = c.labels_of(x)
    at = 1 if x.ndim == weight.ndim else 0
    known: dict[int, Dim] = dict.fromkeys(range(2, weight.ndim))  # positions, which are never cut
    if groups == 1 and channels[at] is not None:
        known[0 if transposed else 1] = channels[at]
    kernel = c.labels_of(weight, known)
    n_in, n_out = x.shape[at], node.outputs[0].shape[at]
    for own in (*kernel[2:], *channels[at + 1 :]):
        c.freeze(own, node, "it is a spatial dimension of a convolution")
    if transposed:
        out = _transposed(c, node, channels[at], kernel, n_in, n_out, groups)
    elif groups == 1:
        c.contract(x, channels[at], kernel[1], node)
        out = kernel[0]
    else:
        group, inner = c.labels.split(channels[at], (groups, n_in // groups))
        group_w, own = c.labels.split(kernel[0], (groups, n_out // groups))
        c.contract(x, inner, kernel[1] if n_in > groups else None, node)
        c.bind_groups(node, c.tie(group, group_w, node, "the groups of the other side cannot be cut"), groups)
        out = kernel[0]
    if bias is not None:
        c.adopt(bias, 0, out)
        out = c.tie(out, c.labels_of(bias)[0], node, "its bias cannot be cut")
    c.mark(channels[at], "channel")
    c.mark(out, "channel")
    return [[*channels[:at], out, *[None] * (x.ndim - at - 1)]]


def _transposed(c: Coupler, node: Node, x: Dim, kernel: list[Dim], n_in: int, n_out: int, groups: int) -> Dim:
    c_in = c.tie(x, kernel[0], node, "it meets channels that cannot be cut")
    if groups == 1:
        return kernel[1]
    group, _ = c.labels.split(c_in, (groups, n_in // groups))
    c.bind_groups(node, group, groups)
    return c.labels.merge([group, kernel[1]], (groups, n_out // groups))


@rule("_grouped_mm")
def grouped_product(c: Coupler, node: Node) -> list[list[Dim]] | None:
    """Rows of one matrix, each multiplied by the matrix of its expert: ``[t, k] x [e, k, j] -> [t, j]``."""
    a, b = node.args[:2]
    if a.ndim != 2 or b.ndim != 3:
        c.freeze_all(node)
        return None
    rows, inner = c.labels_of(a)
    experts, other, out = c.labels_of(b)
    c.freeze(experts, node, "rows are sorted by it")
    c.freeze(rows, node, "rows are sorted by expert")
    c.contract(a, inner, other, node)
    return [[None, out]]


@rule("embedding", "embedding_renorm")
def embedding(c: Coupler, node: Node) -> list[list[Dim]]:
    """Rows of a table: the rows stay, the columns are channels."""
    weight, index = node.args[:2]
    rows, columns = c.labels_of(weight)
    c.freeze(rows, node, "it is looked up by index")
    return [[*c.labels_of(index), columns]]


@rule("_embedding_bag", "_embedding_bag_forward_only", "embedding_bag")
def embedding_bag(c: Coupler, node: Node) -> list[list[Dim]]:
    """Sums of rows of a table."""
    rows, columns = c.labels_of(node.args[0])
    c.freeze(rows, node, "it is looked up by index")
    return [[None, columns], *nothing(node.outputs[1:])]


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(c: Coupler, node: Node) -> list[list[Dim]]:
    """``g * v / |v|``: cutting a dimension over which the norm is taken would change what is kept."""
    v, g = node.args[:2]
    dim = (node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % v.ndim
    labels = list(c.labels_of(v))
    for d, own in enumerate(labels):
        if d != dim:
            c.freeze(own, node, "weight norm takes a norm over it")
    labels[dim] = c.tie(labels[dim], c.labels_of(g)[dim if g.ndim > 1 else 0], node, "")
    scale: list[Dim] = [labels[dim] if n > 1 else None for n in node.outputs[1].shape] if len(node.outputs) > 1 else []
    return [labels, scale] if scale or len(node.outputs) > 1 else [labels]


@rule("mkldnn_rnn_layer")
def mkldnn_rnn(c: Coupler, node: Node) -> list[list[Dim]]:
    """One layer of an LSTM as the CPU library computes it: ``[gates * hidden, ...]`` weights, gates side by side."""
    x, w_ih, w_hh, b_ih, b_hh, hx, cx = node.args[:7]
    hidden = w_hh.shape[1]
    gates = w_hh.shape[0] // hidden
    c.contract(x, c.labels_of(x)[-1], c.labels_of(w_ih)[1], node)
    unit = c.labels_of(w_hh)[1]
    for value in (w_ih, w_hh, b_ih, b_hh):
        own = c.labels_of(value)[0]
        c.tie(own, np.tile(unit, gates) if unit is not None else None, node, "")
    for state in (hx, cx):
        c.tie(c.labels_of(state)[-1], unit, node, "its initial state cannot be cut")
    return [[*[None] * (v.ndim - 1), unit] if v.ndim and v.shape[-1] == hidden else [None] * v.ndim for v in node.outputs]
