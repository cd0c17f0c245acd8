"""Choose which units go, and remove them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from secateur.errors import LayerError, ModelError, RecipeError, UnknownName
from secateur.graph.choose import Scope, select
from secateur.graph.cut import cut
from secateur.graph.graph import KINDS, Graph, Group, trace
from secateur.graph.scores import Reduction, Scores, unit_scores
from secateur.graph.verify import difference
from secateur.layers import matches
from secateur.types import Cut, LayerPlan, Plan

#: A cut model's output may differ from the masked original's by this much, relative to its largest value.
TOLERANCE = 1e-4


def prune_channels(
    model: nn.Module,
    example: Any,
    sparsity: float,
    scores: Scores = "l1",
    *,
    kinds: Sequence[str] = ("channel", "neuron"),
    ignore: Sequence[str] = (),
    round_to: int = 1,
    min_width: int = 1,
    scope: Scope = "local",
    reduction: Reduction = "mean",
    verify: bool = True,
) -> tuple[nn.Module, Plan]:
    """A smaller copy of `model` with the fraction `sparsity` of its units removed, and the plan that was carried out.

    `scope` says whether units compete within their group (local), with those of groups that do the same in other blocks
    (isomorphic) or with all others (global). `kinds` are the kinds of
    units to remove (see `Group`), `ignore` names or shell patterns of parameters or modules to leave as they are, `round_to`
    the multiple that widths are rounded to, and `reduction` how the saliencies of a unit's coupled slices make its score.
    Unless `verify` is off, the result is compared on the example with the original in which the same units are masked.
    Raises RecipeError for a sparsity out of [0, 1), UnknownName where `ignore` matches nothing, LayerError where nothing can
    be cut, and ModelError where the forward fails or the comparison does.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> smaller, plan = prune_channels(model, torch.randn(1, 4), sparsity=0.5)
    >>> smaller[0]
    Linear(in_features=4, out_features=4, bias=True)
    """
    graph = trace(model, example)
    groups = choose_groups(graph, kinds, ignore)
    if not groups:
        reason = next((g.reason for g in graph.groups if g.reason and g.kind in kinds), "it has no units of these kinds")
        raise LayerError(f"nothing of {type(model).__name__} can be cut as {', '.join(kinds)}: {reason}")
    ranked = unit_scores(model, groups, scores, reduction)
    removed = select(graph, groups, ranked, sparsity, round_to=round_to, min_width=min_width, scope=scope)
    plan = make_plan(graph, model, removed)
    smaller = cut(model, plan)
    if verify and not any(p.is_meta for p in model.parameters()):
        error = difference(model, smaller, graph, graph.flags(removed), example)
        if not error <= TOLERANCE:
            raise ModelError(
                f"the cut model differs from the masked original by {error:.2g}, relative; at most {TOLERANCE:g} is rounding. "
                f"Leave out what does not follow the cut with ignore=, and report the model."
            )
    return smaller, plan


def choose_groups(graph: Graph, kinds: Sequence[str], ignore: Sequence[str] = ()) -> list[Group]:
    """Groups to cut: of two groups of one kind that cut the same dimension, the one with more units."""
    for kind in kinds:
        if kind not in KINDS:
            raise RecipeError(f"unknown kind of unit {kind!r}. Known: {', '.join(KINDS)}.")
    names = graph.recording.values
    for pattern in ignore:
        if not any(matches(pattern, name) for name in names):
            raise UnknownName("layer", pattern, {n.rpartition(".")[0] or n for n in names})
    wanted = [
        g for g in graph.units() if g.kind in kinds and not any(matches(p, m.tensor) for p in ignore for m in g.members)
    ]  # fmt: skip
    chosen: dict[int, Group] = {}
    for group in sorted(wanted, key=lambda g: -g.units):
        if not any(s in chosen and chosen[s].kind == group.kind for s in group.siblings):
            chosen[group.id] = group
    ids = set(chosen)
    return [g for g in wanted if g.id in ids and g.ties <= ids]


def make_plan(graph: Graph, model: nn.Module, removed: Mapping[int, Iterable[int]]) -> Plan:
    """The plan that removes units of groups: all cuts, and the attributes that must follow. Touches nothing.

    Raises LayerError where a tensor would be left empty, or where sizes in the forward cannot follow.
    """
    removed_leaves = graph.flags(removed)
    attributes, wrong = graph.attributes(removed_leaves)
    if wrong:
        raise LayerError(f"the sizes in the forward cannot follow this cut: {wrong[0]}")
    if other := graph.other_path(removed_leaves, attributes):
        raise LayerError(f"the forward depends on {other}. Keep more units there, or leave it out with ignore=.")
    values = graph.recording.values
    cuts = []
    for (name, dim), gone in graph.removed_indices(removed_leaves).items():
        flags = np.ones(values[name].shape[dim], bool)
        flags[gone] = False
        kept = np.flatnonzero(flags)
        if not len(kept):
            raise LayerError(
                f"nothing would be left of dimension {dim} of {name!r}, shape {values[name].shape}. Lower the sparsity."
            )
        cuts.append(Cut(name, dim, tuple(kept.tolist())))
    return Plan(_layers(graph, cuts), tuple(cuts), _skipped(graph, cuts), attributes)


def _layers(graph: Graph, cuts: Sequence[Cut]) -> tuple[LayerPlan, ...]:
    kept: dict[str, dict[int, int]] = {}
    for c in cuts:
        kept.setdefault(c.tensor, {})[c.dim] = len(c.kept)
    partners: dict[str, set[str]] = {}
    for group in graph.groups:
        names = [m.tensor for m in group.members if m.tensor in kept]
        for name in names:
            partners.setdefault(name, set()).update(n for n in names[:16] if n != name)
    out = []
    for name, value in graph.recording.values.items():
        if name not in kept or value.ndim < 2:
            continue
        shape = tuple(kept[name].get(d, n) for d, n in enumerate(value.shape))
        why = "coupled with " + ", ".join(sorted(partners[name])[:8]) if partners.get(name) else ""
        out.append(LayerPlan(name, value.shape, int(np.prod(value.shape)), int(np.prod(shape)), "channel", why))
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


__all__ = ["TOLERANCE", "choose_groups", "make_plan", "prune_channels"]
