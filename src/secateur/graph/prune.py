"""Choose which units go, and remove them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from secateur.errors import LayerError, RecipeError, UnknownName
from secateur.graph.checked import cut_checked
from secateur.graph.choose import Scope, select
from secateur.graph.cut import cut
from secateur.graph.graph import KINDS, Graph, Group, trace
from secateur.graph.plan import make_plan
from secateur.graph.scores import Reduction, Scores, unit_scores
from secateur.layers import matches
from secateur.types import Plan


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
    outputs: bool = False,
    verify: bool = True,
) -> tuple[nn.Module, Plan]:
    """A smaller copy of `model` with the fraction `sparsity` of its units removed, and the plan that was carried out.

    `scope` says whether units compete within their group (local), with those of groups that do the same in other blocks
    (isomorphic) or with all others (global). `kinds` are the kinds of
    units to remove (see `Group`), `ignore` names or shell patterns of parameters or modules to leave as they are, `round_to`
    the multiple that widths are rounded to, and `reduction` how the saliencies of a unit's coupled slices make its score. With
    `outputs` what the model returns may become narrower too.
    Unless `verify` is off, the result is compared on the example with the original in which the same units are masked.
    Raises RecipeError for a sparsity out of [0, 1), UnknownName where `ignore` matches nothing, LayerError where nothing can
    be cut, and ModelError where the forward fails or the comparison does.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> smaller, plan = prune_channels(model, torch.randn(1, 4), sparsity=0.5)
    >>> smaller[0]
    Linear(in_features=4, out_features=4, bias=True)
    """
    graph = trace(model, example, cut_outputs=outputs)
    groups = choose_groups(graph, kinds, ignore)
    if not groups:
        reason = next((g.reason for g in graph.groups if g.reason and g.kind in kinds), "it has no units of these kinds")
        raise LayerError(f"nothing of {type(model).__name__} can be cut as {', '.join(kinds)}: {reason}")
    ranked = unit_scores(model, groups, scores, reduction)
    removed = select(graph, groups, ranked, sparsity, round_to=round_to, min_width=min_width, scope=scope)
    plan = make_plan(graph, model, removed)
    if verify and not any(p.is_meta for p in model.parameters()):
        return cut_checked(model, plan, graph, removed, example).model, plan
    return cut(model, plan), plan


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


__all__ = ["choose_groups", "prune_channels"]
