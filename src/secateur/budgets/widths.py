"""How long each dimension of a model's tensors is when every group keeps a given number of its best units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from secateur.graph import Graph, Group
from secateur.graph.labels import Array, Dim
from secateur.graph.trace import Value


class Length:
    """The length of one dimension as a function of the units that `groups` keep. Equal dimensions share one object."""

    def __init__(self, full: int, index: Array, owner: Array, rank: Array):
        self.full = full
        self.groups: tuple[int, ...] = tuple(np.unique(owner).tolist())
        self._index, self._owner, self._rank = index, owner, rank
        self._known: dict[tuple[int, ...], int] = {}

    def __call__(self, kept: Mapping[int, int]) -> int:
        """The length when group g keeps its ``kept[g]`` best units."""
        counts = tuple(kept[g] for g in self.groups)
        if counts not in self._known:
            limit = np.zeros(max(self.groups) + 1, np.int64)
            limit[list(self.groups)] = counts
            gone = self._index[self._rank >= limit[self._owner]]
            self._known[counts] = self.full - len(np.unique(gone))
        return self._known[counts]


#: A length that changes with the cut, or a number.
Extent = Length | int


class Widths:
    """Lengths of all dimensions of a traced model. `scores [units]` of each group say which of its units go first."""

    def __init__(self, graph: Graph, groups: Iterable[Group], scores: Mapping[int, Tensor]):
        self._graph = graph
        self._rank = np.zeros(graph.classes, np.int64)
        self._owner = np.full(graph.classes, -1)
        for group in groups:
            best_first = scores[group.id].double().sort(descending=True, stable=True).indices.numpy()
            self._rank[group.leaves[best_first]] = np.arange(group.units)
            self._owner[group.leaves] = group.id
        self._by_content: dict[bytes, Extent] = {}
        self._by_identity: dict[int, tuple[Array, Extent]] = {}

    def of(self, value: Value) -> tuple[Extent, ...]:
        """The length of each dimension of a recorded tensor."""
        labels: list[Dim] = value.labels if value.labels is not None else [None] * value.ndim
        return tuple(n if own is None else self._extent(own) for own, n in zip(labels, value.shape, strict=True))

    def _extent(self, labels: Array) -> Extent:
        if id(labels) not in self._by_identity:
            index, leaf = self._graph.leaves_of(labels)
            chosen = self._owner[leaf] >= 0
            index, leaf = index[chosen], leaf[chosen]
            key = np.concatenate([[len(labels)], index, leaf]).tobytes()
            if key not in self._by_content:
                made = Length(len(labels), index.astype(np.int64), self._owner[leaf], self._rank[leaf])
                self._by_content[key] = made if len(leaf) else len(labels)
            self._by_identity[id(labels)] = labels, self._by_content[key]  # kept alive, or its id would be given away
        return self._by_identity[id(labels)][1]


def size(extent: Extent, kept: Mapping[int, int]) -> int:
    """An extent as a number."""
    return extent if isinstance(extent, int) else extent(kept)
