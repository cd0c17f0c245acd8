"""Normalisations and reductions. A statistic over a dimension that is cut is taken over what is kept of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.graph.rules import nothing, rule
from secateur.graph.trace import Value

if TYPE_CHECKING:
    from secateur.graph.couple import Coupler
    from secateur.graph.labels import Dim
    from secateur.graph.trace import Node


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_no_update", "_batch_norm_with_update", "batch_norm",
)  # fmt: skip
def batch_norm(c: Coupler, node: Node) -> list[list[Dim]]:
    """Per channel: scale, shift and running statistics go with it."""
    labels = list(c.labels_of(node.args[0]))
    for d in (0, *range(2, len(labels))):  # of a standardised weight these are its inputs
        c.mixed(labels[d], node)
    for other in node.args[1:5]:
        if isinstance(other, Value) and other.ndim == 1 and other.shape[0] > 1:
            c.adopt(other, 0, labels[1])
            labels[1] = c.tie(labels[1], c.labels_of(other)[0], node, "its normalisation cannot be cut")
    return [labels, *nothing(node.outputs[1:])]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def layer_norm(c: Coupler, node: Node) -> list[list[Dim]]:
    """Over the last dimensions, with scale and shift of their shape."""
    x, shape = node.args[0], node.args[1]
    labels = list(c.labels_of(x))
    for other in node.args[2:4]:
        if isinstance(other, Value):
            if other.ndim == 1:
                c.adopt(other, 0, labels[-1])
            for d, own in enumerate(c.labels_of(other)):
                at = x.ndim - other.ndim + d
                labels[at] = c.tie(labels[at], own, node, "its normalisation cannot be cut")
    for d in range(x.ndim - len(shape), x.ndim):
        c.mixed(labels[d], node)
    return [labels, *nothing(node.outputs[1:])]


@rule("native_group_norm", "group_norm")
def group_norm(c: Coupler, node: Node) -> list[list[Dim]]:
    """Groups of channels are normalised together: the same channels of each go, or whole groups."""
    x = node.args[0]
    groups = int(node.args[6]) if node.name == "native_group_norm" else int(node.args[1])
    labels = list(c.labels_of(x))
    group, inner = c.labels.split(labels[1], (groups, x.shape[1] // groups))
    c.bind_groups(node, group, groups)
    c.mixed(inner, node)
    for other in node.args[1:4]:
        if isinstance(other, Value) and other.ndim == 1:
            c.adopt(other, 0, labels[1])
            labels[1] = c.tie(labels[1], c.labels_of(other)[0], node, "its normalisation cannot be cut")
    return [labels, *nothing(node.outputs[1:])]


_SUMS = ("sum", "nansum")
_STATISTICS = ("mean", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm")


def _dims(node: Node, x: Value) -> list[int]:
    dims: Any = node.kwargs.get("dim")
    if dims is None:
        at = 2 if node.name in ("norm", "linalg_vector_norm") else 1
        dims = node.args[at] if len(node.args) > at else None
    if isinstance(dims, bool) or dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(x.ndim))
    return [d % x.ndim for d in (dims if isinstance(dims, (list, tuple)) else (dims,))] if x.ndim else []


def _reduced(labels: list[Dim], dims: list[int], out: Value) -> list[Dim]:
    if out.ndim == len(labels):
        return [None if d in dims else own for d, own in enumerate(labels)]
    return [own for d, own in enumerate(labels) if d not in dims]


@rule(*_SUMS, *_STATISTICS)
def statistics(c: Coupler, node: Node) -> list[list[Dim]]:
    """Sums leave out what is cut; means and norms are taken over what is kept."""
    x = node.args[0]
    dims, labels = _dims(node, x), c.labels_of(x)
    for d in dims:
        if c.is_weight(x):
            c.freeze(labels[d], node, "a statistic of the weight is taken over it")
        elif node.name not in _SUMS:
            c.mixed(labels[d], node)
    return [_reduced(labels, dims, out) for out in node.outputs]


@rule(
    "amax", "amin", "max", "min", "argmax", "argmin", "prod", "any", "all", "logsumexp", "median", "nanmedian", "mode",
    "aminmax", "count_nonzero", "logcumsumexp", "kthvalue",
)  # fmt: skip
def extremes(c: Coupler, node: Node) -> list[list[Dim]]:
    """Whatever depends on which values are there does not survive their removal."""
    tensors = node.tensors
    if node.name in ("max", "min") and len(tensors) == 2:
        from secateur.graph.rules.elementwise import broadcast

        return [broadcast(c, node, tensors, node.outputs[0].shape)]
    x = node.args[0]
    dims, labels = _dims(node, x), c.labels_of(x)
    for d in dims:
        c.freeze(labels[d], node, f"{node.name} is taken over it")
    return [_reduced(labels, dims, out) for out in node.outputs]


@rule(
    "_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "cumprod", "sort", "argsort",
    "topk", "renorm", "cummax", "cummin",
)  # fmt: skip
def along(c: Coupler, node: Node) -> list[list[Dim]] | None:
    """Operations along one dimension that mix its indices: it stays, the others pass."""
    x = node.args[0]
    at = 2 if node.name in ("topk", "renorm") else 1
    dim = node.kwargs.get("dim", node.args[at] if len(node.args) > at else -1)
    if isinstance(dim, bool) or x.ndim == 0:
        c.freeze_all(node)
        return None
    labels = list(c.labels_of(x))
    c.freeze(labels[dim % x.ndim], node, f"{node.name} is taken over it")
    labels[dim % x.ndim] = None
    return [list(labels) for _ in node.outputs]


_POOLS = """
    max_pool2d_with_indices max_pool3d_with_indices max_pool1d max_pool2d max_pool3d mkldnn_max_pool2d mkldnn_max_pool3d
    avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d grid_sampler_3d grid_sampler
    quantized_max_pool2d lp_pool2d
"""


@rule(*_POOLS.split())
def spatial(c: Coupler, node: Node) -> list[list[Dim]]:
    """Pooling and interpolation: channels pass, spatial dimensions stay."""
    x = node.args[0]
    keep = 2 if node.name.startswith("grid") else x.ndim - _spatial_dims(node.name)
    labels = list(c.labels_of(x))
    for other in node.tensors:
        own = c.labels_of(other)
        for d in range(keep if other is x else 0, other.ndim):
            c.freeze(own[d], node, "it is a spatial dimension")
    return [[*labels[:keep], *[None] * (out.ndim - keep)] for out in node.outputs]


def _spatial_dims(name: str) -> int:
    return next(int(n) for n in "123" if f"{n}d" in name)
