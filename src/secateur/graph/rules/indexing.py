"""Operations that pick by index tensors, and tensors made from nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.graph.rules import rule
from secateur.graph.trace import Value

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.graph.couple import Coupler
    from secateur.graph.labels import Dim
    from secateur.graph.trace import Node


@rule("index_select")
def index_select(c: Coupler, node: Node) -> list[list[Dim]]:
    """One dimension is picked from by index and stays; the others pass."""
    x, dim = node.args[0], node.args[1]
    labels = list(c.labels_of(x))
    c.freeze(labels[dim % x.ndim], node, "it is picked from by index")
    labels[dim % x.ndim] = None
    return [labels]


@rule("lift_fresh", "lift_fresh_copy")
def lifted(c: Coupler, node: Node) -> list[list[Dim]]:
    """A tensor that the forward wrote down in numbers."""
    x = node.args[0]
    if x.constant is not None and not x.constant.is_meta:
        c.numbers[node.outputs[0]] = x.constant
    return [c.labels_of(x)]


@rule("index", "_unsafe_index")
def index(c: Coupler, node: Node) -> list[list[Dim]] | None:
    """Advanced indexing: indexed dimensions stay, the others pass."""
    x, indices, out = node.args[0], list(node.args[1]), node.outputs[0]
    if any(isinstance(i, Value) and i.dtype.is_floating_point is False and str(i.dtype) in _MASKS for i in indices):
        c.freeze_all(node)
        return None
    own = c.labels_of(x)
    indices += [None] * (x.ndim - len(indices))
    picked = [d for d, i in enumerate(indices) if i is not None]
    for d in picked:
        c.freeze(_needed(own[d], c.numbers.get(indices[d])), node, "it is picked from by index")
    tensors = [i for i in indices if i is not None]
    width = max((i.ndim for i in tensors), default=0)
    # what the index tensors themselves are indexed by may be cut
    front: list[Dim] = []
    for k in range(width):
        n = max((i.shape[k - width + i.ndim] for i in tensors if k - width + i.ndim >= 0), default=1)
        dims = [
            c.labels_of(i)[k - width + i.ndim] for i in tensors if k - width + i.ndim >= 0 and i.shape[k - width + i.ndim] == n
        ]
        dim = dims[0] if n > 1 else None
        for other in dims[1:]:
            dim = c.tie(dim, other, node, "") if n > 1 else None
        front.append(dim)
    rest = [own[d] for d in range(x.ndim) if d not in picked]
    adjacent = picked == list(range(picked[0], picked[-1] + 1)) if picked else True
    at = picked[0] if adjacent and picked else 0
    labels = [*rest[:at], *front, *rest[at:]]
    assert len(labels) == out.ndim
    return [labels]


def _needed(own: Dim, index: Tensor | None) -> Dim:
    """What must stay so that an index goes on picking the same: all up to it, or all from it on if it counts from the end."""
    if own is None or index is None:
        return own
    places = index.flatten().tolist()
    if all(place >= 0 for place in places):
        return own[: max(places, default=-1) + 1]
    return own[min(places) :] if all(place < 0 for place in places) else own


_MASKS = ("torch.bool", "torch.uint8")


@rule(
    "index_put", "_unsafe_index_put", "index_add", "scatter", "scatter_add", "scatter_reduce", "slice_scatter",
    "select_scatter", "index_copy",
)  # fmt: skip
def put(c: Coupler, node: Node) -> list[list[Dim]] | None:
    """Writes by index: allowed in dimensions that are not cut, and only where all shapes speak for themselves."""
    c.freeze_all(node)
    return None


@rule("gather")
def gather(c: Coupler, node: Node) -> list[list[Dim]]:
    """Picks along one dimension; along the others, index and source are tied where they are of one size."""
    x, dim, at = node.args[:3]
    labels, picks = c.labels_of(x), c.labels_of(at)
    out: list[Dim] = []
    for d in range(x.ndim):
        if d == dim % x.ndim:
            c.freeze(labels[d], node, "it is picked from by index")
            out.append(picks[d])
        elif x.shape[d] == at.shape[d]:
            out.append(c.tie(labels[d], picks[d], node, "it is picked from by an index that cannot be cut"))
        else:
            c.freeze(labels[d], node, "it is picked from by index")
            c.freeze(picks[d], node, "it is an index")
            out.append(None)
    return [out]


@rule(
    "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "empty_strided",
    "new_empty_strided", "rand", "randn", "scalar_tensor", "empty_permuted",
)  # fmt: skip
def made(c: Coupler, node: Node) -> list[list[Dim]]:
    """The same value everywhere: any part of it will do, so that its size can follow what it meets."""
    out = node.outputs[0]
    if node.name in ("rand", "randn"):
        return [[None] * out.ndim]
    return [[c.sized(node, d, n) for d, n in enumerate(out.shape)]]


@rule(
    "arange", "eye", "linspace", "tril_indices", "triu_indices", "randint", "randperm", "one_hot", "nonzero", "unique2",
    "_local_scalar_dense", "item", "is_nonzero", "equal", "bincount", "histc", "searchsorted", "bucketize", "sym_size",
    "_assert_tensor_metadata",
)  # fmt: skip
def positions(c: Coupler, node: Node) -> list[list[Dim]] | None:
    """Values that depend on positions: what goes in and comes out stays."""
    c.freeze_all(node, "its positions matter")
    return None
