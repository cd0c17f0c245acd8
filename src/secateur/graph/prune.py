"""Choose which units go, and remove them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import LayerError, ModelError, RecipeError
from secateur.graph.cut import cut
from secateur.graph.graph import KINDS, Graph, Group, trace
from secateur.graph.verify import difference
from secateur.layers import find_layers, matches
from secateur.types import Cut, LayerPlan, Plan

#: ``l1``; a callable ``(name, canonical weight) -> saliency``; or saliencies by parameter name. Higher = keep.
Scores = Literal["l1"] | Callable[[str, Tensor], Tensor] | Mapping[str, Tensor]
Reduction = Literal["sum", "mean", "l2", "max"]

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
    scope: Literal["local", "global"] = "local",
    reduction: Reduction = "mean",
    verify: bool = True,
) -> tuple[nn.Module, Plan]:
    """A smaller copy of `model` with the fraction `sparsity` of its units removed, and the plan that was carried out.

    `scope` says whether units compete within their group (local) or with all others (global). `kinds` are the kinds of
    units to remove (see `Group`), `ignore` names or shell patterns of parameters or modules to leave as they are, `round_to`
    the multiple that widths are rounded to, and `reduction` how the saliencies of a unit's coupled slices make its score.
    Unless `verify` is off, the result is compared on the example with the original in which the same units are masked.
    Raises RecipeError for a sparsity out of [0, 1), ModelError where the forward fails or the comparison does.

    >>> smaller, plan = prune_channels(model, torch.randn(1, 3, 224, 224), sparsity=0.5)
    """
    graph = trace(model, example)
    groups = choose_groups(graph, kinds, ignore)
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
    wanted = [
        g for g in graph.units() if g.kind in kinds and not any(matches(p, m.tensor) for p in ignore for m in g.members)
    ]  # fmt: skip
    chosen: dict[int, Group] = {}
    for group in sorted(wanted, key=lambda g: -g.units):
        if not any(s in chosen and chosen[s].kind == group.kind for s in group.siblings):
            chosen[group.id] = group
    ids = set(chosen)
    return [g for g in wanted if g.id in ids and g.ties <= ids]


def unit_scores(model: nn.Module, groups: Iterable[Group], scores: Scores, reduction: Reduction = "mean") -> dict[int, Tensor]:
    """For each group ``[units]``: the saliencies of all weights that go with a unit, reduced to one number."""
    layers, _ = find_layers(model) if any(True for _ in model.parameters()) else ({}, {})
    tensors = dict(model.named_parameters(remove_duplicate=False))
    cache: dict[str, Tensor | None] = {}

    def saliency(name: str) -> Tensor | None:
        if name not in cache:
            weight = tensors.get(name)
            if weight is None or weight.ndim < 2:
                cache[name] = None
            elif isinstance(scores, Mapping):
                found = scores.get(name)
                cache[name] = layers[name].stored(found) if found is not None and name in layers else found
            elif callable(scores):
                layer = layers.get(name)
                given = scores(name, layer.canonical(weight.detach()) if layer else weight.detach())
                cache[name] = layer.stored(given) if layer else given
            else:
                cache[name] = weight.detach().abs()
        return cache[name]

    return {group.id: _fold(group, saliency, reduction) for group in groups}


def _fold(group: Group, saliency: Callable[[str], Tensor | None], reduction: Reduction) -> Tensor:
    total = torch.zeros(group.units, dtype=torch.float64)
    elements = 0.0
    for member in group.members:
        score = saliency(member.tensor)
        if score is None:
            continue
        units = torch.from_numpy(member.units)
        rest = [d for d in range(score.ndim) if d != member.dim]
        index = torch.from_numpy(member.indices)
        if reduction == "max":
            values = score.amax(rest).double()[index]
            total = total.scatter_reduce(0, units, values, "amax")
        else:
            values = (score.square() if reduction == "l2" else score).sum(rest, dtype=torch.float64)[index]
            total.index_add_(0, units, values)
            elements += score.numel() / score.shape[member.dim] * len(index) / group.units
    if reduction == "l2":
        return total.sqrt()
    return total / max(elements, 1.0) if reduction == "mean" else total


def select(
    graph: Graph,
    groups: Sequence[Group],
    scores: Mapping[int, Tensor],
    sparsity: float,
    *,
    round_to: int = 1,
    min_width: int = 1,
    scope: str = "local",
) -> dict[int, list[int]]:
    """Units that go, by group: the lowest scores, exactly as many as the sparsity says, ties broken by index."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, float) or not 0 <= sparsity < 1:
        raise RecipeError(f"sparsity is a fraction from 0.0 up to but not including 1.0, got {sparsity!r}")
    if scope not in ("local", "global"):
        raise RecipeError(f"scope is 'local' or 'global', got {scope!r}")
    keep = {g.id: g.units - round(g.units * sparsity) for g in groups}
    if scope == "global":
        keep |= _global_counts(groups, scores, sparsity, min_width)
    removed: dict[int, list[int]] = {}
    for group in groups:
        together = {group.id, *group.ties}
        wanted = round(sum(keep[g] for g in together) / len(together))
        n = _rounded(wanted, group.units, round_to, min_width)
        if n < group.units:
            order = torch.argsort(scores[group.id], stable=True)
            removed[group.id] = sorted(order[: group.units - n].tolist())
    return removed


def _global_counts(groups: Sequence[Group], scores: Mapping[int, Tensor], sparsity: float, min_width: int) -> dict[int, int]:
    free = [g for g in groups if not g.ties]
    if not free:
        return {}
    protected = []
    for g in free:
        s = scores[g.id].clone()
        s[torch.argsort(s, stable=True, descending=True)[: max(min_width, 1)]] = torch.inf
        protected.append(s)
    owner = torch.cat([torch.full((g.units,), i) for i, g in enumerate(free)])
    order = torch.argsort(torch.cat(protected), stable=True)
    gone = torch.bincount(owner[order[: round(len(owner) * sparsity)]], minlength=len(free))
    return {g.id: max(g.units - int(n), min(max(min_width, 1), g.units)) for g, n in zip(free, gone, strict=True)}


def _rounded(wanted: int, units: int, round_to: int, min_width: int) -> int:
    """The multiple of `round_to` nearest to `wanted`, at least `min_width` and one multiple, at most all units."""
    n = max(wanted, min_width, 1)
    if round_to > 1:
        n = max(round(n / round_to), 1) * round_to
        while n < min_width:
            n += round_to
    return min(n, units)


def make_plan(graph: Graph, model: nn.Module, removed: Mapping[int, Iterable[int]]) -> Plan:
    """The plan that removes units of groups: all cuts, and the attributes that must follow. Touches nothing.

    Raises LayerError where a tensor would be left empty, or where sizes in the forward cannot follow.
    """
    flags = graph.flags({g: list(units) for g, units in removed.items()})
    attributes, wrong = graph.attributes(flags)
    if wrong:
        raise LayerError(f"the sizes in the forward cannot follow this cut: {wrong[0]}")
    values = graph.recording.values
    cuts = []
    for (name, dim), gone in graph.removed_indices(flags).items():
        kept = np.setdiff1d(np.arange(values[name].shape[dim]), gone)
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
    skipped: dict[str, str] = {}
    for group in graph.groups:
        for member in group.members:
            if group.reason and member.tensor not in cut_names and graph.recording.values[member.tensor].ndim >= 2:
                skipped.setdefault(member.tensor, group.reason)
    return skipped


__all__ = ["TOLERANCE", "choose_groups", "make_plan", "prune_channels", "select", "unit_scores"]
