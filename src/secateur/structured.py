"""The procedure for units that are cut out for real: trace, score, choose, cut, check. The result is a smaller dense model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.budgets.choose import kept_within
from secateur.criteria import CRITERIA
from secateur.data.batches import Batch, Batches, Loss, inputs_of
from secateur.errors import LayerError, ModelError, RecipeError
from secateur.graph import Graph, Group, choose_groups, cut, difference, lowest, make_plan, select, trace, unit_scores
from secateur.graph.choose import Scope
from secateur.graph.prune import TOLERANCE
from secateur.job import check_data
from secateur.layers import check_finite, find_layers, matches
from secateur.patterns import Units
from secateur.recipe import Recipe
from secateur.registry import bind, name_of
from secateur.repair_units import refit, write
from secateur.sparsity import check_sparsity
from secateur.stats import collect
from secateur.types import MaskSet, Plan

#: Allocations of units that are cut out -> whose units compete: uniform within each group, isomorphic among groups that do the
#: same in different blocks (Fang et al. 2024, Isomorphic Pruning for Vision Models), global among all.
ALLOCATIONS: Mapping[str, Scope] = {"uniform": "local", "isomorphic": "isomorphic", "global": "global"}


@dataclass(frozen=True)
class UnitJob:
    """A recipe that cuts units, resolved for one model and its data. Nothing is computed yet."""

    recipe: Recipe
    units: Units
    sparsity: float | None  #: None where a budget decides
    batches: Batches | None
    train: Batches | None
    loss: Loss | None
    example: Batch
    train_loss: Loss | None = None  #: of the fine-tuning, where it is another than `loss`

    @property
    def arguments(self) -> Any:
        """The example without its labels, as the graph takes it: a tuple of arguments, or a mapping of named ones."""
        args, kwargs = inputs_of(self.example)
        return kwargs or args

    @property
    def pattern_name(self) -> str:
        """As users write it."""
        return self.units.name


@dataclass(frozen=True)
class Chosen:
    """Which units go, by group of the graph, and the plan that removes them."""

    graph: Graph
    removed: dict[int, list[int]]
    plan: Plan
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Smaller:
    """A cut model, the plan that made it, its masks in the shapes of the original, and what the report shall say."""

    model: nn.Module
    plan: Plan
    masks: MaskSet
    notes: tuple[str, ...]


def prepare_units(
    model: nn.Module,
    recipe: Recipe,
    units: Units,
    *,
    data: Iterable[Batch] | None,
    train: Iterable[Batch] | None,
    loss: Loss | None,
    example: Batch | None,
) -> UnitJob:
    """Resolve `recipe` for `model`. Whatever is wrong with it is said here, before any work is done."""
    sparsity = _check(recipe, units)
    name, _ = bind(CRITERIA, recipe.criterion)
    batches = None if data is None else Batches(data)
    training = batches if train is None else Batches(train)
    check_data(recipe, name, CRITERIA[name].facts["needs"], batches, training)
    if example is None and batches is not None:
        example = next(iter(batches))
    if example is None:
        raise RecipeError(f"pattern {units.name!r} follows a batch through the model: pass example= or data=")
    check_finite(find_layers(model)[0].values())
    return UnitJob(recipe, units, sparsity, batches, training, loss, example)


def cut_units(model: nn.Module, job: UnitJob, *, inplace: bool = False) -> Smaller:
    """A smaller model from which the recipe's fraction of units is cut, checked against the masked original.

    Raises ModelError where the forward cannot be traced or the cut model gives other outputs than the masked original, and
    LayerError where nothing can be cut; the model is then as it was.
    """
    chosen = choose_units(model, job)
    masks = masks_of(model, chosen.plan)
    smaller = cut(model, chosen.plan)
    error = difference(model, smaller, chosen.graph, chosen.graph.flags(chosen.removed), job.arguments)
    if not error <= TOLERANCE:
        raise ModelError(
            f"the cut model differs from the masked original by {error:.2g} (relative); at most {TOLERANCE:g} is rounding. "
            "Nothing was changed. Leave out what does not follow the cut with ignore=."
        )
    notes = list(chosen.notes)
    changes: Mapping[str, Tensor] = {}
    if job.recipe.repair != "none" and job.batches is not None:
        bias_only = job.recipe.repair == "bias"
        repaired = refit(model, smaller, chosen.plan, job.batches, bias_only=bias_only, seed=job.recipe.seed)
        changes, notes = repaired.tensors, [*notes, *repaired.notes]
    if inplace:
        smaller = cut(model, chosen.plan, inplace=True)
    write(smaller, changes)
    checked = f"on the example the cut model gives the masked original's output within {error:.1e} (relative)"
    return Smaller(smaller, chosen.plan, masks, (*notes, checked))


def choose_units(model: nn.Module, job: UnitJob) -> Chosen:
    """Trace, score and choose. Touches nothing."""
    recipe, units = job.recipe, job.units
    graph = trace(model, job.arguments)
    groups = _groups(graph, recipe, units)
    saliency, notes = _saliency(model, job, groups)
    how = recipe.reduction or ("abs_sum" if CRITERIA[name_of(recipe.criterion)].facts["reduction"] == "abs_sum" else "mean")
    scores = unit_scores(model, groups, saliency, "sum" if how == "abs_sum" else how)  # type: ignore[arg-type]
    if how == "abs_sum":
        scores = {g: s.abs() for g, s in scores.items()}
    scope = ALLOCATIONS[recipe.allocation or "uniform"]  # type: ignore[index]
    widths: dict[str, Any] = {"round_to": units.round_to, "min_width": units.min_width, "scope": scope}
    if job.sparsity is not None:
        removed = select(graph, groups, scores, job.sparsity, **widths)
        return Chosen(graph, removed, make_plan(graph, model, removed), (*graph.notes, *notes))
    kept, budget = kept_within(recipe.budget, model, graph, groups, scores, example=job.arguments, **widths)
    removed = lowest(groups, scores, kept)
    plan = replace(make_plan(graph, model, removed), budget=budget)
    return Chosen(graph, removed, plan, (*graph.notes, *notes))


def masks_of(model: nn.Module, plan: Plan) -> MaskSet:
    """The cuts of a plan as masks in the shapes of the original parameters: True where a weight is still there."""
    masks: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for c in (c for c in plan.cuts if c.tensor == name):
            line = torch.zeros(parameter.shape[c.dim], dtype=torch.bool)
            line[list(c.kept)] = True
            mask = masks.setdefault(name, torch.ones(parameter.shape, dtype=torch.bool))
            mask &= line.reshape([-1 if d == c.dim else 1 for d in range(parameter.dim())])
    return MaskSet(masks)


def _check(recipe: Recipe, units: Units) -> float | None:
    if recipe.sparsity is None and recipe.budget is None:
        raise RecipeError(
            "sparsity is missing: give the fraction of units to cut, such as sparsity=0.5, or a budget such as '50% MACs'"
        )
    if recipe.allocation is not None and recipe.allocation not in list(ALLOCATIONS):
        raise RecipeError(f"pattern {units.name!r} knows the allocations {', '.join(ALLOCATIONS)}; got {recipe.allocation!r}")
    if recipe.solver != "keep":
        raise RecipeError(
            f"pattern {units.name!r} cuts units out; solver {recipe.solver!r} repairs masked weights. Leave it out."
        )
    if recipe.steps > 1:
        raise RecipeError(
            f"pattern {units.name!r} is cut in one step, steps={recipe.steps}. Prune the result again to go further."
        )
    return None if recipe.sparsity is None else check_sparsity(recipe.sparsity)


def _groups(graph: Graph, recipe: Recipe, units: Units) -> list[Group]:
    groups = choose_groups(graph, units.kinds, recipe.ignore)
    if recipe.layers is not None:
        wanted = recipe.layers
        groups = [g for g in groups if any(matches(p, m.tensor) for p in wanted for m in g.members)]
    if not groups:
        fixed = [f"{g.name}: {g.reason}" for g in graph.groups if g.reason and g.kind in units.kinds][:3]
        why = "; ".join(fixed) or f"the model has no units of kind {', '.join(units.kinds)}"
        raise LayerError(f"pattern {units.name!r}: there is nothing to cut. {why}.")
    return groups


def _saliency(model: nn.Module, job: UnitJob, groups: Iterable[Group]) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """The criterion's saliency of every weight that belongs to a group, by parameter name."""
    name, score = bind(CRITERIA, job.recipe.criterion)
    members = {m.tensor for g in groups for m in g.members}
    layers = {n: layer for n, layer in find_layers(model)[0].items() if n in members}
    needs = CRITERIA[name].facts["needs"]
    found = collect(model, layers, needs, batches=job.batches, loss=job.loss, seed=job.recipe.seed, example=job.example)
    return {n: score(stats) for n, stats in found.layers.items()}, found.notes
