"""Operations that move indices: their labels move exactly as the indices do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.graph.labels import KEPT, Array, concatenate, refinement
from secateur.graph.rules import rule
from secateur.graph.trace import Value

if TYPE_CHECKING:
    from secateur.graph.couple import Coupler
    from secateur.graph.labels import Dim
    from secateur.graph.trace import Node


def _arg(node: Node, position: int, keyword: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(keyword, default)


def reshape(c: Coupler, node: Node, labels: list[Dim], old: tuple[int, ...], new: tuple[int, ...]) -> list[Dim]:
    """Labels after a row-major change of shape from `old` to `new`."""
    out: list[Dim] = []
    if 0 in old:
        for dim in labels:
            c.freeze(dim, node, "it is a part of an empty tensor")
        return [None] * len(new)
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0, left, right = i, j, 1, 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        out += _block(c, node, labels[i0:i], old[i0:i], new[j0:j])
    return out


def _block(c: Coupler, node: Node, labels: list[Dim], old: tuple[int, ...], new: tuple[int, ...]) -> list[Dim]:
    if old == new:
        return labels
    if all(dim is None for dim in labels):
        return [None] * len(new)
    sizes = refinement(old, new)
    if sizes is None:
        for dim in labels:
            c.freeze(dim, node, f"it is reshaped from {old} to {new}, which does not keep blocks of it together")
        return [None] * len(new)
    parts: list[Dim] = []
    for dim, n in zip(labels, old, strict=True):
        own = _take(sizes, len(parts), n)
        parts += c.labels.split(dim, own) if len(own) > 1 else [dim] * len(own)
    out: list[Dim] = []
    start = 0
    for n in new:
        own = _take(sizes, start, n)
        out.append(c.labels.merge(parts[start : start + len(own)], own) if own else None)
        start += len(own)
    return out


def _take(sizes: tuple[int, ...], start: int, n: int) -> tuple[int, ...]:
    """The next of `sizes` whose product is `n`; none for 1."""
    stop = start
    while math.prod(sizes[start:stop]) < n:
        stop += 1
    return sizes[start:stop]


@rule(
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "_reshape_copy",
    "view_copy",
    "squeeze",
    "unsqueeze",
    "flatten",
    "unflatten",
)
def view(c: Coupler, node: Node) -> list[list[Dim]] | None:
    """A change of shape."""
    x = node.args[0]
    if node.op._overloadname == "dtype":
        if x.shape == node.outputs[0].shape:
            return [c.labels_of(x)]
        c.freeze_all(node)
        return None
    return [reshape(c, node, c.labels_of(x), x.shape, node.outputs[0].shape)]


@rule("permute", "transpose", "t", "swapaxes", "movedim", "numpy_T", "mT", "transpose_copy", "permute_copy")
def permute(c: Coupler, node: Node) -> list[list[Dim]]:
    """Dimensions change places."""
    x = node.args[0]
    order = list(range(x.ndim))
    if node.name in ("permute", "permute_copy"):
        order = [d % x.ndim for d in node.args[1]]
    elif node.name == "t":
        order.reverse()
    else:
        a, b = node.args[1] % x.ndim, node.args[2] % x.ndim
        order[a], order[b] = order[b], order[a]
    labels = c.labels_of(x)
    return [[labels[d] for d in order]]


@rule("expand", "expand_copy", "expand_as", "broadcast_to")
def expand(c: Coupler, node: Node) -> list[list[Dim]]:
    """New indices are copies of one: each copy may go, as its position goes in what it meets, so its labels are new."""
    x, out = node.args[0], node.outputs[0]
    labels: list[Dim] = [None] * out.ndim
    own = c.labels_of(x)
    for d, n in enumerate(out.shape):
        source = d - out.ndim + x.ndim
        if source >= 0 and x.shape[source] == n:
            labels[d] = own[source]
        elif n > 1:
            labels[d] = c.sized(node, d, n)
    return [labels]


@rule("repeat")
def repeat(c: Coupler, node: Node) -> list[list[Dim]]:
    """Whole copies laid end to end."""
    x, out = node.args[0], node.outputs[0]
    counts = list(node.args[1])
    own = [None] * (len(counts) - x.ndim) + list(c.labels_of(x))
    labels: list[Dim] = []
    for d, (dim, count) in enumerate(zip(own, counts, strict=True)):
        labels.append(
            np.tile(dim, count) if dim is not None else (c.sized(node, d, out.shape[d]) if _grown(x, out, d) else None)
        )
    return [labels]


def _grown(x: Value, out: Value, d: int) -> bool:
    source = d - out.ndim + x.ndim
    return out.shape[d] > 1 and (source < 0 or x.shape[source] == 1)


@rule("repeat_interleave")
def repeat_interleave(c: Coupler, node: Node) -> list[list[Dim]] | None:
    """Each index repeated a number of times in place."""
    x, repeats = node.args[0], _arg(node, 1, "repeats")
    dim = _arg(node, 2, "dim")
    if not isinstance(repeats, int) or dim is None:
        c.freeze_all(node)
        return None
    labels = list(c.labels_of(x))
    own = labels[dim % x.ndim]
    labels[dim % x.ndim] = np.repeat(own, repeats) if own is not None else None
    return [labels]


@rule("cat", "concat", "concatenate")
def cat(c: Coupler, node: Node) -> list[list[Dim]]:
    """Tensors end to end along one dimension, tied along the others."""
    parts = [t for t in node.args[0] if t.shape != (0,)]
    dim = _arg(node, 1, "dim", 0) % max(parts[0].ndim, 1)
    labels = list(c.labels_of(parts[0]))
    for part in parts[1:]:
        for d, own in enumerate(c.labels_of(part)):
            if d != dim:
                labels[d] = c.tie(labels[d], own, node, "it is concatenated with a dimension that cannot be cut")
    labels[dim] = concatenate((c.labels_of(p)[dim], p.shape[dim]) for p in parts)
    return [labels]


@rule("stack")
def stack(c: Coupler, node: Node) -> list[list[Dim]]:
    """Tensors along a new dimension."""
    parts = node.args[0]
    dim = _arg(node, 1, "dim", 0) % (parts[0].ndim + 1)
    labels = list(c.labels_of(parts[0]))
    for part in parts[1:]:
        for d, own in enumerate(c.labels_of(part)):
            labels[d] = c.tie(labels[d], own, node, "it is stacked with a dimension that cannot be cut")
    return [[*labels[:dim], None, *labels[dim:]]]


@rule("slice", "narrow", "slice_copy")
def slice_(c: Coupler, node: Node) -> list[list[Dim]]:
    """A range of one dimension. That its ends can follow a cut is checked where the range was written."""
    x = node.args[0]
    dim = _arg(node, 1, "dim", 0) % x.ndim
    labels = list(c.labels_of(x))
    n = x.shape[dim]
    if node.name == "narrow":
        start, stop, step = node.args[2], node.args[2] + node.args[3], 1
    else:
        start, stop, step = _arg(node, 2, "start"), _arg(node, 3, "end"), _arg(node, 4, "step", 1)
    span = slice(start, stop, step)
    own = labels[dim]
    if own is not None and span.indices(n) != (0, n, 1):
        if step != 1:
            _stride(c, node, own, step, *span.indices(n)[:2])
        elif not c.written(node):
            c.ends(node, own, *span.indices(n)[:2])
        labels[dim] = own[span]
    return [labels]


def _stride(c: Coupler, node: Node, own: Array, step: int, start: int, stop: int) -> None:
    """Every `step`-th index is taken: blocks of `step` indices go together, so that places stay right."""
    if len(own) % step or start >= step or stop < len(own):
        c.freeze(own, node, f"every {step}th index of a part of it is taken")
        return
    blocks = own.reshape(-1, step)
    for j in range(1, step):
        c.tie(blocks[:, 0], blocks[:, j], node, "")


@rule("split", "split_copy", "chunk", "unsafe_chunk", "unsafe_split")
def split(c: Coupler, node: Node) -> list[list[Dim]]:
    """Equal parts of one dimension. They stay equal because the same indices of each go."""
    x = node.args[0]
    dim = _arg(node, 2, "dim", 0) % x.ndim
    own = c.labels_of(x)[dim]
    sizes = [o.shape[dim] for o in node.outputs]
    if own is not None and len(sizes) > 1:
        if len(set(sizes)) == 1:
            parts = own.reshape(len(sizes), sizes[0])
            for part in parts[1:]:
                c.tie(parts[0], part, node, "")
        else:
            c.freeze(own, node, f"it is split into unequal parts {sizes}")
    return _parts(c, x, dim, sizes)


@rule("glu")
def glu(c: Coupler, node: Node) -> list[list[Dim]]:
    """One half gates the other."""
    x = node.args[0]
    dim = _arg(node, 1, "dim", -1) % x.ndim
    labels = list(c.labels_of(x))
    own = labels[dim]
    if own is not None:
        first, second = own.reshape(2, -1)
        labels[dim] = c.tie(first, second, node, "")
    return [labels]


@rule("split_with_sizes", "split_with_sizes_copy", "unsafe_split_with_sizes")
def split_with_sizes(c: Coupler, node: Node) -> list[list[Dim]]:
    """Parts of given sizes."""
    x = node.args[0]
    dim = _arg(node, 2, "dim", 0) % x.ndim
    sizes = [o.shape[dim] for o in node.outputs]
    own = c.labels_of(x)[dim]
    if own is not None and not c.written(node):
        c.freeze(own, node, f"it is split into parts of fixed sizes {sizes}")
    return _parts(c, x, dim, sizes)


def _parts(c: Coupler, x: Value, dim: int, sizes: list[int]) -> list[list[Dim]]:
    labels = c.labels_of(x)
    own = labels[dim]
    out, start = [], 0
    for n in sizes:
        out.append([*labels[:dim], own[start : start + n] if own is not None and n > 1 else None, *labels[dim + 1 :]])
        if own is not None and n == 1:
            c.labels.freeze(own[start : start + 1], "it is a part of one index")
        start += n
    return out


@rule("select", "unbind", "select_copy", "unbind_copy")
def select(c: Coupler, node: Node) -> list[list[Dim]]:
    """Single indices of one dimension, which therefore keeps its size."""
    x = node.args[0]
    dim = _arg(node, 1, "dim", 0) % x.ndim
    labels = c.labels_of(x)
    c.freeze(labels[dim], node, "single indices of it are picked")
    rest = [*labels[:dim], *labels[dim + 1 :]]
    return [list(rest) for _ in node.outputs]


@rule("flip", "roll", "fliplr", "flipud")
def moved(c: Coupler, node: Node) -> list[list[Dim]] | None:
    """Indices change places within a dimension: index i and its partner go together, so that the places stay right."""
    x = node.args[0]
    labels = list(c.labels_of(x))
    if node.name == "flip":
        for d in node.args[1]:
            own = labels[d % x.ndim]
            if own is not None:
                labels[d % x.ndim] = own[::-1]
        return [labels]
    dims = _arg(node, 2, "dims", ())
    if not dims and any(d is not None for d in labels):
        c.freeze_all(node)
        return None
    for d in dims:
        c.freeze(labels[d % x.ndim], node, "its indices are rolled")
        labels[d % x.ndim] = None
    return [labels]


@rule("constant_pad_nd", "pad")
def pad(c: Coupler, node: Node) -> list[list[Dim]]:
    """Padding adds indices that stay."""
    x, out, amounts = node.args[0], node.outputs[0], list(node.args[1])
    labels = list(c.labels_of(x))
    for k in range(len(amounts) // 2):
        d = x.ndim - 1 - k
        low, high = amounts[2 * k], amounts[2 * k + 1]
        own = labels[d]
        if own is None or (low == 0 and high == 0):
            continue
        if low < 0 or high < 0:
            c.freeze(own, node, "it is cropped by a fixed amount")
            labels[d] = None
        else:
            labels[d] = np.concatenate([np.full(low, KEPT), own, np.full(high, KEPT)])
        assert labels[d] is None or len(labels[d]) == out.shape[d]  # type: ignore[arg-type]
    return [labels]


@rule("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d")
def pad_spatial(c: Coupler, node: Node) -> list[list[Dim]]:
    """Padding of the last dimensions, which hold no channels."""
    x = node.args[0]
    spatial = int(node.name[-2])
    labels = list(c.labels_of(x))
    for d in range(x.ndim - spatial, x.ndim):
        c.freeze(labels[d], node, "it is padded by reflection or replication")
        labels[d] = None
    return [labels]


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def shuffle(c: Coupler, node: Node) -> list[list[Dim]]:
    """Channels to space, space to channels, and channels among channels, as the reshapes they are."""
    x, factor = node.args[0], node.args[1]
    labels = list(c.labels_of(x))
    if node.name.endswith("channel_shuffle"):
        groups, rest = c.labels.split(labels[1], (factor, x.shape[1] // factor))
        labels[1] = c.labels.merge([rest, groups], (x.shape[1] // factor, factor))
        return [labels]
    channel = x.ndim - 3
    c.freeze(labels[-1], node, "it is shuffled with channels")
    c.freeze(labels[-2], node, "it is shuffled with channels")
    if node.name == "pixel_shuffle":
        block = c.labels.split(labels[channel], (x.shape[channel] // factor**2, factor**2))
        c.freeze(block[1], node, "it becomes a spatial dimension")
        return [[*labels[:channel], block[0], None, None]]
    own = labels[channel]
    widened = np.repeat(own, factor**2) if own is not None else None
    return [[*labels[:channel], widened, None, None]]


@rule("as_strided", "unfold", "im2col", "col2im", "diagonal", "tril", "triu", "fold", "diag_embed")
def positional(c: Coupler, node: Node) -> list[list[Dim]] | None:
    """Works by position on the dimensions it names; the others pass."""
    x, out = node.args[0], node.outputs[0]
    labels = list(c.labels_of(x))
    if node.name == "unfold":
        dim = node.args[1] % x.ndim
        c.freeze(labels[dim], node, "sliding windows of it are taken")
        return [[None if d == dim else own for d, own in enumerate(labels)] + [None]]
    if node.name in ("tril", "triu"):
        for own in labels[-2:]:
            c.freeze(own, node, "a triangle of it is masked")
        return [[*labels[:-2], None, None]]
    if node.name == "im2col" and x.ndim == 4:
        window = out.shape[1] // x.shape[1]
        return [[labels[0], c.labels.merge([labels[1], None], (x.shape[1], window)), None]]
    c.freeze_all(node)
    return None
