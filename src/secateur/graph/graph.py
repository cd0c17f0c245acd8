"""The graph of a model: groups of units, each unit the slices of parameters that live or die together."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.graph.couple import Coupler
from secateur.graph.equations import Equation, attributes_in, counts_in, evaluate, solve, text
from secateur.graph.labels import KEPT, Array, Labels
from secateur.graph.rewrite import Frames, find_rewrite
from secateur.graph.sizes import COMPARISONS
from secateur.graph.trace import Recording, Value, record
from secateur.types import Rewrite

_Integers = TypeVar("_Integers", NDArray[np.int32], NDArray[np.int64])
#: What there is one of for every pair of a leaf and an index: half the memory is enough.
Indices = NDArray[np.int32]
_DIGITS = re.compile(r"\d+")
KINDS = ("channel", "neuron", "head", "head_dim", "width")


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one parameter or buffer: index ``indices[i]`` goes with unit ``units[i]``."""

    tensor: str
    dim: int
    indices: Array
    units: Array
    role: int = 0  #: which factor of the dimension the units are, where it is a product


@dataclass(eq=False)
class Group:
    """Units that compete with each other because they cut the same slices of the same tensors.

    `kind` is one of ``channel`` (of convolutions), ``neuron`` (of linear layers), ``head``, ``head_dim`` and ``width`` (of a
    residual stream of linear layers). A group with a `reason` cannot be cut. Groups in `ties` must keep equally many units.
    """

    id: int
    kind: str
    units: int
    leaves: Array
    members: tuple[Member, ...]
    reason: str | None = None
    siblings: set[int] = field(default_factory=set)  #: groups that cut the same dimensions another way
    ties: set[int] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The first tensor the units belong to."""
        return self.members[0].tensor

    @property
    def shape(self) -> tuple[Any, ...]:
        """Equal for groups that do the same in different blocks of a network."""
        return (self.kind, self.units, *((_DIGITS.sub("#", m.tensor), m.dim, m.role) for m in self.members))

    def __repr__(self) -> str:
        where = ", ".join(f"{m.tensor}:{m.dim}" for m in self.members[:4]) + (", ..." if len(self.members) > 4 else "")
        return f"Group({self.id}, {self.kind}, {self.units} units of {where}{'; fixed: ' + self.reason if self.reason else ''})"


class Graph:
    """What `trace` found: groups of units, and the equations that sizes must obey."""

    def __init__(self, model: nn.Module, recording: Recording, *, cut_outputs: bool = False):
        self.recording = recording
        coupler = Coupler(recording, cut_outputs=cut_outputs)
        coupler.run()
        self.coupler = coupler
        self.unknown = {op: tuple(sorted(modules)) for op, modules in coupler.unknown.items()}
        self.notes = tuple(recording.notes)
        self._leaves = _Leaves(coupler.labels)
        self.classes = self._leaves.count  #: numbers of leaves are less than that
        self._count_pairs: dict[int, tuple[Array, Indices, Indices]] = {}
        self._expanded: dict[bytes, tuple[Indices, Indices]] = {}
        self._groups_in: dict[bytes, list[int]] = {}
        self._classes: dict[str, Any] = {name: type(module) for name, module in model.named_modules()}
        self.links: dict[int, dict[str, tuple[str, ...]]] | None = None  #: what `links_of` found
        reasons = self._frozen()
        self.groups: list[Group] = self._find_groups(reasons)
        self._group_of = np.full(self.classes, -1)
        for group in self.groups:
            self._group_of[group.leaves] = group.id
        self._try_groups()

    def units(self, kind: str | None = None) -> list[Group]:
        """Groups that can be cut, of one kind or of all."""
        return [g for g in self.groups if g.reason is None and kind in (None, g.kind)]

    def removed_indices(self, removed: NDArray[np.bool_]) -> dict[tuple[str, int], Indices]:
        """``removed [labels]`` flags of leaves -> for each (tensor, dim) the indices that go.

        Where the same labels run along several dimensions, these have one and the same array.
        """
        gone = np.flatnonzero(removed[self._pairs.leaf])
        column, index = self._pairs.column[gone], self._pairs.index[gone]
        edges = np.flatnonzero(column[1:] != column[:-1]) + 1
        parts = np.split(index, edges) if len(index) else []
        found = {int(column[at]): distinct(part) for at, part in zip([0, *edges.tolist()], parts, strict=False)}
        return {(name, dim): found[at] for name, dim, at in self._where if at in found}

    def groups_of(self, labels: Array) -> list[int]:
        """Numbers of the groups whose units decide what is kept of `labels`, ascending."""
        roots = self._leaves.roots[labels]
        content = roots.tobytes()
        if content not in self._groups_in:
            found = np.flatnonzero(np.bincount(self._group_of[self._leaves.below(roots)] + 1)).tolist()
            self._groups_in[content] = [g - 1 for g in found if g]
        return self._groups_in[content]

    def count(self, labels: Array, removed: NDArray[np.bool_]) -> int:
        """How many of `labels` are kept."""
        return int(np.count_nonzero(self.mask(labels, removed)))

    def mask(self, labels: Array, removed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of `labels` are kept."""
        index, leaf = self.leaves_of(labels)
        kept = np.ones(len(labels), bool)
        kept[index[removed[leaf]]] = False
        return kept

    def flags(self, units: Mapping[int, Iterable[int]]) -> NDArray[np.bool_]:
        """Flags of the leaves that go, from unit numbers by group."""
        removed = np.zeros(self.classes, bool)
        for group, numbers in units.items():
            removed[self.groups[group].leaves[np.asarray(list(numbers), dtype=np.int64)]] = True
        return removed

    def attributes(
        self, removed: NDArray[np.bool_], equations: Sequence[Equation] | None = None
    ) -> tuple[dict[str, int], list[Equation]]:
        """New values of module attributes after a cut, and equations between sizes that it breaks."""
        old = self.recording.sizes.old
        chosen = self.coupler.equations if equations is None else equations
        counts: dict[int, int] = {}

        def count(labels: Array) -> int:
            if id(labels) not in counts:
                counts[id(labels)] = self.count(labels, removed)
            return counts[id(labels)]

        found, wrong = solve(chosen, old, count)
        return {name: n for name, n in found.items() if n != old[name]}, wrong

    def rewrites(self, wrong: Iterable[Equation], removed: NDArray[np.bool_]) -> tuple[tuple[Rewrite, ...], list[Equation]]:
        """Rewrites of forwards with which equations need not hold after a cut, and the equations for which there is none."""
        found: dict[Rewrite, None] = {}
        freed: dict[tuple[str, Frames], int] = {}
        rest = []
        for e in wrong:
            place = find_rewrite(self._classes[e.module], e.frames, e.argument)
            rewrite = None if place is None else replace(place, module=e.module)
            old = evaluate(e.right, {}, self.recording.sizes.old, len)
            stays = (e.left[0] == "count" and self.count(e.left[1], removed) == old) or e.right == ("const", old)
            # of one call, one size follows from the others
            if rewrite is not None and e.free and freed.setdefault((e.module, e.frames), e.argument) == e.argument:
                found[rewrite] = None
            elif rewrite is not None and stays:
                found[replace(rewrite, value=old)] = None
            else:
                rest.append(e)
        return tuple(found), rest

    def other_path(self, removed: NDArray[np.bool_], attributes: dict[str, int]) -> str | None:
        """The first comparison of sizes in the forward that would come out otherwise after a cut."""
        old = self.recording.sizes.old
        for left, symbol, right, result, module in self.recording.sizes.conditions:
            a, b = (evaluate(e, attributes, old, lambda labels: self.count(labels, removed)) for e in (left, right))
            if COMPARISONS[symbol](a, b) != result:
                return f"{text(left)} {symbol} {text(right)} in {module or 'the model itself'}, which would be {a} {symbol} {b}"
        return None

    def leaves_of(self, labels: Array) -> tuple[Indices, Indices]:
        """``(index, leaf)``: position `index` of `labels` goes when any of its leaves goes."""
        key = id(labels)
        if key not in self._count_pairs:
            roots = self._leaves.roots[labels]
            content = roots.tobytes()
            if content not in self._expanded:
                self._expanded[content] = self._leaves.expand(roots)
            self._count_pairs[key] = (labels, *self._expanded[content])
        return self._count_pairs[key][1:]

    def _frozen(self) -> dict[int, str]:
        """Reasons by frozen class; a frozen product freezes its factors."""
        labels = self.coupler.labels
        reasons: dict[int, str] = {KEPT: "it meets a dimension that cannot be cut"}
        flags = np.zeros(self.classes, bool)
        flags[KEPT] = True
        frozen = list(labels.frozen)
        for equation in self.coupler.equations:
            for side, other in ((equation.left, equation.right), (equation.right, equation.left)):
                if other[0] == "const" and side[0] in ("count", "dim"):
                    frozen += [(own, f"its size is written as a number ({equation})") for own in counts_in(side)]
        pending = [(self._leaves.roots[own], reason) for own, reason in frozen]
        row, factors = self._leaves.row, self._leaves.factors
        while pending:
            own, reason = pending.pop(0)
            new = distinct(own[~flags[own]])
            if not len(new):
                continue
            flags[new] = True
            reasons.update(dict.fromkeys(new.tolist(), reason))
            products = new[row[new] >= 0]
            if len(products):
                children = factors[row[products]].reshape(-1).astype(np.int64)
                pending.append((children[children >= 0], reason))
        return reasons

    def _find_groups(self, reasons: dict[int, str]) -> list[Group]:
        """Leaves that cut the same (tensor, dimension) pairs in the same role make one group."""
        self._where: list[tuple[str, int, int]] = []
        by_identity: dict[int, int] = {}
        by_content: dict[bytes, int] = {}
        dims: list[Array] = []
        for name, value in self.recording.values.items():
            for d, own in enumerate(value.labels or []):
                if own is None:
                    continue
                at = by_identity.get(id(own), -1)
                if at < 0:
                    roots = self._leaves.roots[own]
                    at = by_identity[id(own)] = by_content.setdefault(roots.tobytes(), len(dims))
                    if at == len(dims):
                        dims.append(roots)
                self._where.append((name, d, at))
        if not dims:
            self._pairs = _Pairs(*(np.zeros(0, np.int32) for _ in range(4)))
            return []
        pairs = self._pairs = self._leaves.pairs(dims)
        paths = distinct(pairs.path)
        role = pairs.column * np.int32(len(paths)) + np.searchsorted(paths, pairs.path).astype(np.int32)
        signature = self._signatures(pairs, role, len(dims) * len(paths))
        frozen = np.zeros(self.classes, bool)
        frozen[list(reasons)] = True
        signature[frozen] += np.uint64(1)
        return self._assemble(pairs, role, signature, reasons)

    def _signatures(self, pairs: _Pairs, role: Indices, n_roles: int) -> NDArray[np.uint64]:
        """For each leaf a number that is equal where leaves have the same roles in the same columns."""
        once = distinct(pairs.leaf.astype(np.int64) * n_roles + role)
        weights = np.random.default_rng(0).integers(1, 2**62, n_roles).astype(np.uint64)
        signature = np.zeros(self.classes, np.uint64)
        np.add.at(signature, once // n_roles, weights[once % n_roles])
        return signature

    def _assemble(self, pairs: _Pairs, role: Indices, signature: NDArray[np.uint64], reasons: dict[int, str]) -> list[Group]:
        there, first = np.unique(pairs.leaf, return_index=True)
        leaves: Array = there[np.argsort(first, kind="stable")].astype(np.int64)
        _, start, inverse = np.unique(signature[leaves], return_index=True, return_inverse=True)
        rank = np.empty(len(start), np.int32)
        rank[np.argsort(start)] = np.arange(len(start))
        group_of_leaf = rank[inverse.reshape(-1)]
        order = np.argsort(group_of_leaf, kind="stable")
        sizes = np.bincount(group_of_leaf)
        unit = np.empty(self.classes, np.int64)
        group = np.empty(self.classes, np.int32)
        unit[leaves[order]] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        group[leaves] = group_of_leaf
        members = self._members(pairs, group[pairs.leaf], unit[pairs.leaf], role)
        marks = self._marks()
        groups = []
        for g, own in enumerate(np.split(leaves[order], np.cumsum(sizes)[:-1])):
            reason = reasons.get(int(own[0])) or ("it has one unit only" if len(own) == 1 else None)
            groups.append(Group(g, self._kind(own, marks), len(own), own, tuple(members[g]), reason))
        self._find_siblings(groups, pairs, group)
        return groups

    def _members(self, pairs: _Pairs, group: Indices, unit: Array, role: Indices) -> dict[int, list[Member]]:
        """The members of each group, in the order of the model's tensors; `group`, `unit` and `role` are those of the pairs."""
        by_role = np.argsort(role.astype(np.int64) * (int(group.max()) + 1) + group, kind="stable")
        ordered_role, ordered_group = role[by_role], group[by_role]
        edges = np.flatnonzero((ordered_role[1:] != ordered_role[:-1]) | (ordered_group[1:] != ordered_group[:-1])) + 1
        parts: dict[int, list[tuple[int, Array, Array, int]]] = {}
        for rows in np.split(by_role, edges):
            at = rows[0]
            part = (int(group[at]), pairs.index[rows].astype(np.int64), unit[rows], int(pairs.path[at]))
            parts.setdefault(int(pairs.column[at]), []).append(part)
        found: dict[int, list[Member]] = {}
        for tensor, dim, column in self._where:
            for g, indices, units, path in parts.get(column, ()):
                found.setdefault(g, []).append(Member(tensor, dim, indices, units, path))
        return found

    def _find_siblings(self, groups: list[Group], pairs: _Pairs, group: Indices) -> None:
        at = pairs.column.astype(np.int64) * (int(pairs.index.max()) + 1) + pairs.index
        order = np.argsort(at, kind="stable")
        owner, at = group[pairs.leaf][order], at[order]
        shift = 1
        while (same := at[shift:] == at[:-shift]).any():
            couples = distinct(owner[:-shift][same] * len(groups) + owner[shift:][same])
            for a, b in zip((couples // len(groups)).tolist(), (couples % len(groups)).tolist(), strict=True):
                if a != b:
                    groups[a].siblings.add(b)
                    groups[b].siblings.add(a)
            shift += 1

    def _marks(self) -> dict[str, NDArray[np.bool_]]:
        marks = {kind: np.zeros(self.classes, bool) for kind in ("head", "head_dim", "channel", "width")}
        for kind, flags in marks.items():
            if own := [labels for labels, of_kind in self.coupler.marks if of_kind == kind]:
                flags[self._leaves.expand(self._leaves.roots[np.concatenate(own)])[1]] = True
        return marks

    def _kind(self, leaves: Array, marks: dict[str, NDArray[np.bool_]]) -> str:
        return next((kind for kind, flags in marks.items() if flags[leaves].any()), "neuron")

    def _try_groups(self) -> None:
        """Cut half of each group on paper: where no attribute can make the forward's sizes follow, it cannot be cut."""
        equations = self.coupler.equations
        by_group: dict[int, set[int]] = {}
        by_attribute: dict[str, set[int]] = {}
        groups_in: list[set[int]] = []
        for i, e in enumerate(equations):
            own = {g for side in (e.left, e.right) for a in counts_in(side) for g in self.groups_of(a)}
            groups_in.append(own)
            for g in own:
                by_group.setdefault(g, set()).add(i)
            for side in (e.left, e.right):
                for name in attributes_in(side):
                    by_attribute.setdefault(name, set()).add(i)
        for group in self.groups:
            if group.reason is None and group.id in by_group and not group.ties:
                self._try(group, by_group, by_attribute, groups_in)

    def _try(
        self,
        group: Group,
        by_group: dict[int, set[int]],
        by_attribute: dict[str, set[int]],
        groups_in: list[set[int]],
    ) -> None:
        """Find the groups to be cut alike so that attributes can follow; or else rewrite reshapes, or give the reason."""
        equations = self.coupler.equations
        number = {id(e): i for i, e in enumerate(equations)}
        for rewriting in (False, True):
            together = {group.id}
            for _ in range(4):
                removed = self.flags({g: range((self.groups[g].units + 1) // 2, self.groups[g].units) for g in together})
                relevant = set().union(*(by_group.get(g, set()) for g in together))
                attributes = {a for i in relevant for e in (equations[i].left, equations[i].right) for a in attributes_in(e)}
                relevant |= set().union(*(by_attribute[a] for a in attributes))
                _, wrong = self.attributes(removed, [equations[i] for i in sorted(relevant)])
                if rewriting:
                    _, wrong = self.rewrites(wrong, removed)
                if not wrong:
                    for g in together:
                        self.groups[g].ties = together - {g}
                    return
                joined = together | self._partners(together, set().union(*(groups_in[number[id(e)]] for e in wrong)))
                if joined == together:
                    break
                together = joined
        group.reason = f"no attribute of the model can follow: {wrong[0]}"

    def _partners(self, together: set[int], candidates: set[int]) -> set[int]:
        """Groups that may have to be cut alike: the same of other blocks, or else of the same kind in other tensors."""
        free = [self.groups[g] for g in candidates - together if self.groups[g].reason is None]
        shapes = {self.groups[g].shape for g in together}
        alike = {g.id for g in free if g.shape in shapes}
        if alike:
            return alike
        kinds = {self.groups[g].kind for g in together}
        return {g.id for g in free if g.kind in kinds and not g.siblings & (together | {f.id for f in free})}


@dataclass(eq=False)
class _Pairs:
    """Parallel arrays: index `index` of the labels number `column` goes when `leaf` goes, which is in role `path` there.

    A column stands for all dimensions of tensors along which the same labels run.
    """

    leaf: Indices
    column: Indices
    index: Indices
    path: Indices


class _Leaves:
    """Classes of labels, numbered without gaps, and products taken apart into leaves: the classes that are no products."""

    def __init__(self, labels: Labels):
        roots = labels.all()
        own = np.zeros(len(roots), bool)
        own[roots] = True
        self.count = int(np.count_nonzero(own))
        number = np.empty(len(roots), np.int64)
        number[own] = np.arange(self.count)
        self.roots = number[roots]  #: the number of each label's class; KEPT stays 0
        self.row: Indices = np.full(self.count, -1, np.int32)
        width = max((len(s.sizes) for s in labels.splits), default=1)
        tables = [np.full((0, width), -1, np.int32)]
        start = 0
        for s in labels.splits:
            table = np.full((len(s.whole), width), -1, np.int32)
            for j, column in enumerate(s.columns()):
                table[:, j] = self.roots[column]
            whole = self.roots[s.whole]
            self.row[whole[::-1]] = np.arange(start, start + len(whole))[::-1]
            tables.append(table)
            start += len(whole)
        self.factors = np.concatenate(tables)
        self.row[KEPT] = -1

    def expand(self, roots: Array) -> tuple[Indices, Indices]:
        """``(index, leaf)``: position `index` of representatives goes when any of its leaves goes."""
        if (self.row[roots] >= 0).any():
            return self._taken_apart(roots)[:2]
        index = np.flatnonzero(roots != KEPT).astype(np.int32)
        return index, roots[index].astype(np.int32)

    def below(self, roots: Array) -> Array:
        """The leaves with which any of the representatives goes."""
        while (product := self.row[roots] >= 0).any():
            factors = self.factors[distinct(self.row[roots[product]])]
            roots = np.concatenate([roots[~product], *(distinct(column) for column in factors.T)])
            roots = roots[roots >= 0]
        return roots[roots != KEPT]

    def pairs(self, columns: Sequence[Array]) -> _Pairs:
        """The pairs of columns of representatives, column after column."""
        sizes = [len(own) for own in columns]
        at, leaf, path = self._taken_apart(np.concatenate(columns))
        column = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[at]
        order = np.argsort(column, kind="stable")
        start = np.cumsum([0, *sizes[:-1]], dtype=np.int32)
        return _Pairs(leaf[order], column[order], (at - start[column])[order], path[order])

    def _taken_apart(self, roots: Array) -> tuple[Indices, Indices, Indices]:
        """``(index, leaf, role)`` of representatives."""
        own, index = roots.astype(np.int32), np.arange(len(roots), dtype=np.int32)
        path = np.zeros(len(roots), np.int32)
        done: list[tuple[Indices, Indices, Indices]] = []
        for _ in range(8):
            at = self.row[own]
            whole = np.flatnonzero((at < 0) & (own != KEPT))
            done.append((index[whole], own[whole], path[whole]))
            product = np.flatnonzero(at >= 0)
            if not len(product):
                break
            children = self.factors[at[product]]
            real = np.flatnonzero(children >= 0)
            parent, column = product[real // children.shape[1]], real % children.shape[1]
            index, path = index[parent], path[parent] * 5 + 1 + column.astype(np.int32)
            own = children.reshape(-1)[real]
        columns = [np.concatenate(c) if len(done) > 1 else c[0] for c in zip(*done, strict=True)]
        return columns[0], columns[1], columns[2]


def distinct(values: _Integers) -> _Integers:
    """Sorted distinct values. (Sorting beats the hashing of `numpy.unique` on long runs of integers.)"""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered


def trace(model: nn.Module, example: Any, *, cut_outputs: bool = False) -> Graph:
    """Record one forward of `model` on `example` without computing it, and find what can be cut together.

    `example` is a tensor, a tuple of positional arguments or a mapping of keyword arguments. With `cut_outputs` what the model
    returns may become narrower; otherwise it is never cut. Raises ModelError where the forward fails.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> trace(model, torch.zeros(1, 4)).units("neuron")
    [Group(0, neuron, 8 units of 0.weight:0, 0.bias:0, 2.weight:1)]
    """
    with _no_collection():
        return Graph(model, record(model, example), cut_outputs=cut_outputs)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Tracing makes many small objects that stay; looking for garbage among them takes as long as the tracing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


__all__ = ["KINDS", "Graph", "Group", "Member", "Value", "trace"]
