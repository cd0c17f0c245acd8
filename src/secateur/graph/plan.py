"""The plan of a cut: all slices, the attributes that follow, what is left alone, and who is coupled to whom and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import nn

from secateur.errors import LayerError
from secateur.graph.graph import Graph, Group
from secateur.graph.links import links_of
from secateur.types import Cut, GroupPlan, LayerPlan, Plan


def make_plan(graph: Graph, model: nn.Module, removed: Mapping[int, Iterable[int]]) -> Plan:
    """The plan that removes units of groups: all cuts, and the attributes that must follow. Touches nothing.

    Raises LayerError where a tensor would be left empty, or where sizes in the forward cannot follow.
    """
    removed_leaves = graph.flags(removed)
    attributes, wrong = graph.attributes(removed_leaves)
    rewrites, wrong = graph.rewrites(wrong, removed_leaves)
    if wrong:
        raise LayerError(f"the sizes in the forward cannot follow this cut: {wrong[0]}")
    if other := graph.other_path(removed_leaves, attributes):
        raise LayerError(f"the forward depends on {other}. Keep more units there, or leave it out with ignore=.")
    values = graph.recording.values
    cuts = []
    kept: dict[int, tuple[int, ...]] = {}  # dimensions that lose the same share one tuple
    for (name, dim), gone in graph.removed_indices(removed_leaves).items():
        if id(gone) not in kept:
            flags = np.ones(values[name].shape[dim], bool)
            flags[gone] = False
            kept[id(gone)] = tuple(np.flatnonzero(flags).tolist())
        if not kept[id(gone)]:
            raise LayerError(
                f"nothing would be left of dimension {dim} of {name!r}, shape {values[name].shape}. Lower the sparsity."
            )
        cuts.append(Cut(name, dim, kept[id(gone)]))
    groups = tuple(_group(graph, group, removed) for group in graph.groups)
    return Plan(_layers(graph, cuts), tuple(cuts), _skipped(graph, cuts), attributes, (), rewrites, groups)


def _group(graph: Graph, group: Group, removed: Mapping[int, Iterable[int]]) -> GroupPlan:
    kept = group.units - len(set(removed.get(group.id, ())))
    members = tuple(dict.fromkeys(f"{m.tensor}:{m.dim}" for m in group.members))
    return GroupPlan(group.kind, group.units, kept, members, links_of(graph).get(group.id, {}), group.reason)


def _layers(graph: Graph, cuts: Sequence[Cut]) -> tuple[LayerPlan, ...]:
    kept: dict[str, dict[int, int]] = {}
    for c in cuts:
        kept.setdefault(c.tensor, {})[c.dim] = len(c.kept)
    kinds: dict[str, str] = {}
    for group in graph.groups:
        for member in group.members:
            kinds.setdefault(member.tensor, group.kind)
    out = []
    for name, value in graph.recording.values.items():
        if name not in kept or value.ndim < 2:
            continue
        shape = tuple(kept[name].get(d, n) for d, n in enumerate(value.shape))
        out.append(LayerPlan(name, value.shape, math.prod(value.shape), math.prod(shape), kinds.get(name, "channel")))
    return tuple(out)


def _skipped(graph: Graph, cuts: Sequence[Cut]) -> dict[str, str]:
    """Weights of which no dimension is cut, with the reason of the first group that could have been."""
    cut_names = {c.tensor for c in cuts}
    skipped: dict[str, str] = {
        name: "the forward that was traced does not use it; where another does, it may no longer fit"
        for name, value in graph.recording.values.items()
        if value.labels is None and value.ndim >= 2
    }
    for group in graph.groups:
        for member in group.members:
            if group.reason and member.tensor not in cut_names and graph.recording.values[member.tensor].ndim >= 2:
                skipped.setdefault(member.tensor, group.reason)
    return skipped
