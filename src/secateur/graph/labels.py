"""Labels: which indices of which dimensions live or die together, as a vectorised union-find with products.

Every index of every dimension of every tensor has a label. Two indices with the same label are both kept or both removed.
A label may also be a *product*: when a dimension of ``heads * head_dim`` indices is seen as two dimensions, index
``(h, d)`` is kept exactly where head ``h`` and position ``d`` are both kept. What has no such definition is a leaf: the
smallest thing that can be removed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]
#: The labels of one dimension, or None where nothing of it can ever be removed.
Dim = Array | None

KEPT = 0  #: the label of what is always kept
_AT_ONCE = 1 << 14  #: labels worked on at once, so that what lies between needs little memory


@dataclass(eq=False)
class Split:
    """`whole` seen as a block of `sizes`, row-major: ``whole[i, j, ...] = axes[0][i] and axes[1][j] and ...``."""

    whole: Array
    sizes: tuple[int, ...]
    axes: list[Array]

    def columns(self) -> list[Array]:
        """For each axis the label that each element of `whole` has along it."""
        grid = [np.arange(len(self.whole)) // math.prod(self.sizes[j + 1 :]) % n for j, n in enumerate(self.sizes)]
        return [axis[i] for axis, i in zip(self.axes, grid, strict=True)]


class Labels:
    """All labels of one traced model. Label 0 is always kept; None stands for a dimension made of label 0 alone."""

    def __init__(self) -> None:
        self._parent: Array = np.arange(4096)
        self.count = 1
        self.splits: list[Split] = []
        self.frozen: list[tuple[Array, str]] = []
        self._waiting: list[tuple[Array, Array]] = []  #: ties, drawn together when they are many or somebody asks
        self._n_waiting = 0
        self._split_memo: dict[tuple[bytes, tuple[int, ...]], list[Dim]] = {}
        self._merge_memo: dict[tuple[bytes, ...], Array] = {}

    def fresh(self, n: int) -> Array:
        """`n` new labels."""
        start, self.count = self.count, self.count + n
        if self.count > len(self._parent):
            grown = np.arange(max(self.count, 2 * len(self._parent)))
            grown[: len(self._parent)] = self._parent
            self._parent = grown
        return np.arange(start, self.count)

    def find(self, labels: Array) -> Array:
        """The representative of each label's class."""
        if self._waiting:
            self._settle()
        root = self._parent[labels]
        while True:
            above = self._parent[root]
            if (above == root).all():
                break
            root = above
        self._parent[labels] = root
        return root

    def all(self) -> Array:
        """The representative of every label there is. ``[count]``."""
        for start in range(0, self.count, _AT_ONCE):
            self.find(np.arange(start, min(start + _AT_ONCE, self.count)))  # which shortens the ways, so that one step is left
        return self._parent[: self.count]

    def _settle(self) -> None:
        sides = [np.concatenate(side) for side in zip(*self._waiting, strict=True)]
        self._waiting.clear()
        self._n_waiting = 0
        self.union(*sides)

    def union(self, a: Array, b: Array) -> bool:
        """Make ``a[i]`` and ``b[i]`` one class for every i. True where that changed anything."""
        changed = False
        while True:
            a, b = self.find(a), self.find(b)
            differ = a != b
            if not differ.any():
                return changed
            changed = True
            a, b = a[differ], b[differ]
            self._parent[np.maximum(a, b)] = np.minimum(a, b)

    def tie(self, a: Dim, b: Dim, reason: str) -> Dim:
        """Union of two dimensions of one size. What meets a dimension that cannot be cut is frozen for `reason`."""
        if a is None or b is None:
            self.freeze(a, reason)
            self.freeze(b, reason)
            return None
        if a is not b:
            if a.shape != b.shape:
                raise ValueError(f"dimensions of {len(a)} and {len(b)} indices cannot be tied")
            self._waiting.append((a, b))
            self._n_waiting += len(a)
            if self._n_waiting > _AT_ONCE:
                self._settle()
        return a

    def freeze(self, dim: Dim, reason: str) -> None:
        """Nothing of `dim` may be removed."""
        if dim is not None:
            self.frozen.append((dim, reason))

    def split(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        """See one dimension as several, row-major."""
        if dim is None:
            return [None] * len(sizes)
        block = self.find(dim).reshape(sizes)
        real = [j for j, n in enumerate(sizes) if n > 1 and (block != block.take([0], axis=j)).any()]
        out: list[Dim] = [None] * len(sizes)
        if not real:
            self.freeze(dim, "all its indices are one unit")
            return out
        reduced = block[tuple(slice(None) if j in real else 0 for j in range(len(sizes)))]
        if len(real) == 1:
            out[real[0]] = reduced
            return out
        key = (reduced.tobytes(), reduced.shape)
        if key not in self._split_memo:
            axes = [self.fresh(n) for n in reduced.shape]
            self.splits.append(Split(reduced.reshape(-1), reduced.shape, axes))
            self._split_memo[key] = list(axes)
            self._merge_memo[tuple(a.tobytes() for a in axes)] = reduced.reshape(-1)
        for j, axis in zip(real, self._split_memo[key], strict=True):
            out[j] = axis
        return out

    def merge(self, dims: Sequence[Dim], sizes: Sequence[int]) -> Dim:
        """See several dimensions as one, row-major."""
        real = [(j, d) for j, d in enumerate(dims) if d is not None]
        if not real:
            return None
        arrays = [d for _, d in real]
        if len(arrays) == 1:
            flat = arrays[0]
        else:
            key = tuple(self.find(a).tobytes() for a in arrays)
            if key not in self._merge_memo:
                flat = self.fresh(math.prod(len(a) for a in arrays))
                self.splits.append(Split(flat, tuple(len(a) for a in arrays), arrays))
                self._merge_memo[key] = flat
            flat = self._merge_memo[key]
        shape = [n if d is not None else 1 for d, n in zip(dims, sizes, strict=True)]
        return np.broadcast_to(flat.reshape(shape), tuple(sizes)).reshape(-1)

    def close(self) -> None:
        """Draw all conclusions: equal products have equal factors, whatever shape they were split to."""
        while True:
            while self._congruent():
                pass
            if not self._refine():
                break

    def _congruent(self) -> bool:
        by_signature: dict[tuple[int, ...], list[Split]] = {}
        for s in self.splits:
            by_signature.setdefault(s.sizes[1:], []).append(s)
        changed = False
        for splits in by_signature.values():
            whole = self.find(np.concatenate([s.whole for s in splits]))
            columns = [np.concatenate(c) for c in zip(*(s.columns() for s in splits), strict=True)]
            order = np.argsort(whole, kind="stable")
            same = np.flatnonzero(whole[order][1:] == whole[order][:-1])
            for column in columns:
                changed |= self.union(column[order[same]], column[order[same + 1]])
        return changed

    def _refine(self) -> bool:
        """Bring splits of the same labels to different sizes to their common refinement; collapse them where there is none."""
        if not self._contested():
            return False
        owner: dict[int, Split] = {}
        for s in self.splits:
            for label in self.find(s.whole).tolist():
                other = owner.setdefault(label, s)
                if other.sizes[1:] == s.sizes[1:]:
                    continue
                same = np.array_equal(self.find(other.whole), self.find(s.whole))
                sizes = refinement(other.sizes, s.sizes) if same else None
                if sizes is None:
                    self._collapse(other)
                    self._collapse(s)
                    return True
                for split in (other, s):
                    self._resplit(split, sizes)
                return True
        return False

    def _contested(self) -> bool:
        """Whether some label is split in two ways."""
        way = np.full(self.count, -1)
        ways: dict[tuple[int, ...], int] = {}
        for s in self.splits:
            whole, own = self.find(s.whole), ways.setdefault(s.sizes[1:], len(ways))
            before = way[whole]
            if ((before >= 0) & (before != own)).any():
                return True
            way[whole] = own
        return False

    def _collapse(self, split: Split) -> None:
        """Give up all but the longest axis of a split: along the others its indices go together."""
        longest = int(np.argmax(split.sizes))
        self.union(split.whole, split.columns()[longest])
        for j, axis in enumerate(split.axes):
            if j != longest:
                self.freeze(axis, "its dimension is also seen as blocks of another size")
        self.splits = [s for s in self.splits if s is not split]

    def _resplit(self, split: Split, sizes: tuple[int, ...]) -> None:
        axes: list[Array] = []
        rest = list(sizes)
        for axis, n in zip(split.axes, split.sizes, strict=True):
            parts = [rest.pop(0)]
            while math.prod(parts) < n:
                parts.append(rest.pop(0))
            if len(parts) == 1:
                axes.append(axis)
                continue
            children = [self.fresh(p) for p in parts]
            self.splits.append(Split(axis, tuple(parts), children))
            axes += children
        split.sizes, split.axes = sizes, axes

    def kept(self, removed: Array) -> NDArray[np.bool_]:
        """Whether each label is kept when the leaf classes `removed` go. ``[count]``."""
        roots = self.all()
        kept = np.ones(self.count, bool)
        kept[removed] = False
        rows = [(roots[s.whole], [roots[c] for c in s.columns()]) for s in self.splits]
        before = -1
        while before != (before := int(kept.sum())):
            for whole, columns in rows:
                for column in columns:
                    kept[whole[~kept[column]]] = False
        return kept[roots]


def refinement(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...] | None:
    """The coarsest sizes of which both `a` and `b` are merges, or None: ``(4, 6), (2, 12) -> (2, 2, 6)``."""
    edges = sorted({math.prod(s[i:]) for s in (a, b) for i in range(len(s) + 1)}, reverse=True)
    if any(hi % lo for hi, lo in itertools.pairwise(edges)):
        return None
    return tuple(hi // lo for hi, lo in itertools.pairwise(edges))


def concatenate(dims: Iterable[tuple[Dim, int]]) -> Dim:
    """Labels of dimensions laid end to end; None stands for `n` labels that are always kept."""
    parts = list(dims)
    if all(d is None for d, _ in parts):
        return None
    return np.concatenate([d if d is not None else np.full(n, KEPT) for d, n in parts])
