"""Attention kernels, and recurrences along a sequence that work per channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.graph.rules import rule

if TYPE_CHECKING:
    from secateur.graph.couple import Coupler
    from secateur.graph.labels import Dim
    from secateur.graph.trace import Node


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_fused_attention_overrideable",
    "scaled_dot_product_attention",
)
def attention(c: Coupler, node: Node) -> list[list[Dim]]:
    """``softmax(q k^T scale) v``: queries' heads follow their keys' and values' heads; positions stay.

    Without an explicit scale, the kernel divides by the square root of the head dimension, which therefore stays.
    """
    q, k, v = node.args[:3]
    lq, lk, lv = (list(c.labels_of(x)) for x in (q, k, v))
    for labels in (lq, lk, lv):
        c.freeze(labels[-2], node, "attention goes over these positions")
    c.contract(q, lq[-1], lk[-1], node, activations=True)
    if node.kwargs.get("scale") is None:
        c.freeze(lq[-1], node, "attention is scaled by the root of this size")
    for other in node.tensors[3:]:
        for d in (-1, -2):
            if other.ndim >= 2:
                c.freeze(c.labels_of(other)[d], node, "it is a mask of positions")
    batch = []
    for d in range(q.ndim - 2):
        heads, kv = lq[d], c.tie(lk[d], lv[d], node, "")
        ratio = q.shape[d] // max(k.shape[d], 1)
        if ratio > 1 and kv is not None and k.shape[d] > 1:
            kv = c.labels.merge([kv, c.labels.fresh(ratio)], (k.shape[d], ratio))
        heads = c.tie(heads, kv, node, "") if k.shape[d] > 1 else heads
        c.mark(heads, "head")
        for own in _masks(c, node, q.ndim, d):
            heads = c.tie(heads, own, node, "its mask cannot be cut")
        batch.append(heads)
    c.mark(lv[-1], "head_dim")
    out: list[Dim] = [*batch, None, lv[-1]]
    # the log-sum-exp that some kernels return beside the output is [batch, heads, positions]
    return [out if i == 0 else [None] * value.ndim for i, value in enumerate(node.outputs)]


def _masks(c: Coupler, node: Node, ndim: int, d: int) -> list[Dim]:
    """Labels of masks that have an index of their own for each of dimension `d`."""
    places = [(other, d - ndim + other.ndim) for other in node.tensors[3:]]
    return [c.labels_of(other)[at] for other, at in places if at >= 0 and other.shape[at] > 1]
