"""The procedure for units that are cut out for real: trace, score, choose, cut, check. The result is a smaller dense model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.budgets.amount import parse_budget
from secateur.budgets.choose import choose_counts
from secateur.data.batches import Batch, Batches, Loss, arguments_of
from secateur.errors import LayerError, RecipeError
from secateur.graph import Graph, Group, choose_groups, cut, cut_checked, lowest, make_plan, select, trace
from secateur.graph.choose import Competitor, Scope, competitors
from secateur.graph.config import describe_config
from secateur.job import check_data
from secateur.layer_dropping import plan_blocks
from secateur.layers import check_finite, find_layers, matches
from secateur.patterns import Units
from secateur.recipe import Recipe
from secateur.repair_units import refit, write
from secateur.select import removed_count
from secateur.sparsity import check_sparsity
from secateur.types import MaskSet, Plan, Sensitivity
from secateur.unit_scoring import check_forced, criterion_entry, forced_units, score_units

#: Allocations of units that are cut out -> whose units compete: uniform within each group, isomorphic among groups that do the
#: same in different blocks (Fang et al. 2024, Isomorphic Pruning for Vision Models), global among all.
ALLOCATIONS: Mapping[str, Scope] = {"uniform": "local", "isomorphic": "isomorphic", "global": "global"}
#: The allocation by which every group loses as much as makes the same damage, by the curves of `sc.scan`; and the one by which
#: the least score is lost for what is saved of a budget.
BY_CURVES, BY_GAIN = "sensitivity", "gain"


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
    sensitivity: tuple[Sensitivity, ...] = ()  #: curves, for the allocation that goes by them
    train_loss: Loss | None = None  #: what fine-tuning minimises

    @property
    def arguments(self) -> Any:
        """The example without its labels, as the graph takes it: a tuple of arguments, or a mapping of named ones."""
        return arguments_of(self.example)

    @property
    def allocation(self) -> str:
        """The recipe's; by default uniform, and of a budget in milliseconds by gain."""
        timed = self.recipe.budget is not None and parse_budget(self.recipe.budget).unit == "ms"
        return str(self.recipe.allocation or (BY_GAIN if timed else "uniform"))

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
    sensitivity: Sequence[Sensitivity] = (),
) -> UnitJob:
    """Resolve `recipe` for `model`. Whatever is wrong with it is said here, before any work is done."""
    sparsity = _check(recipe, units)
    if recipe.allocation == BY_CURVES and not sensitivity:
        raise RecipeError(
            f"allocation {BY_CURVES!r} goes by the curves of a scan: pass sensitivity=sc.scan(model, pattern={units.name!r}, "
            "evaluate=...)"
        )
    criterion = criterion_entry(recipe, blocks=units.whole_blocks)
    batches = None if data is None else Batches(data)
    training = batches if train is None else Batches(train)
    check_data(recipe, criterion.name, criterion.facts["needs"], batches, training)
    if example is None and batches is not None:
        example = next(iter(batches))
    if example is None:
        raise RecipeError(f"pattern {units.name!r} follows a batch through the model: pass example= or data=")
    check_finite(find_layers(model)[0].values())
    return UnitJob(recipe, units, sparsity, batches, training, loss, example, tuple(sensitivity))


def cut_units(model: nn.Module, job: UnitJob, *, inplace: bool = False) -> Smaller:
    """A smaller model from which the recipe's fraction of units is cut, checked against the masked original.

    Raises ModelError where the forward cannot be traced or the cut model gives other outputs than the masked original, and
    LayerError where nothing can be cut; the model is then as it was.
    """
    chosen = choose_units(model, job)
    masks = masks_of(model, chosen.plan)
    checked = cut_checked(model, chosen.plan, chosen.graph, chosen.removed, job.arguments)
    smaller = checked.model
    shapes = {name: p.shape for name, p in model.named_parameters()}
    notes = list(chosen.notes)
    changes: Mapping[str, Tensor] = {}
    if job.recipe.repair != "none" and job.batches is not None:
        bias_only = job.recipe.repair == "bias"
        repaired = refit(model, smaller, chosen.plan, job.batches, bias_only=bias_only, seed=job.recipe.seed)
        changes, notes = repaired.tensors, [*notes, *repaired.notes]
    if inplace:
        smaller = cut(model, chosen.plan, inplace=True)
    write(smaller, changes)
    notes.append(
        f"on the example the cut model gives the output of the {checked.against} within {checked.difference:.1e} (relative)"
    )
    configured = describe_config(smaller, shapes, job.arguments)
    return Smaller(smaller, chosen.plan, masks, (*notes, *([configured] if configured else [])))


@dataclass(frozen=True)
class Ranked:
    """The groups that a recipe cuts, and ``[units]`` scores of each, by id: the lowest go first."""

    graph: Graph
    groups: list[Group]
    scores: dict[int, Tensor]
    notes: tuple[str, ...]


def rank_units(model: nn.Module, job: UnitJob) -> Ranked:
    """Trace and score, for patterns of units: whole blocks have no groups. Touches nothing."""
    recipe, units = job.recipe, job.units
    graph = trace(model, job.arguments, cut_outputs=units.outputs)
    groups = units_to_cut(graph, recipe, units)
    found = score_units(model, groups, recipe, units, batches=job.batches, loss=job.loss, example=job.example)
    return Ranked(graph, list(found.groups), dict(found.scores), (*graph.notes, *found.notes))


def choose_units(model: nn.Module, job: UnitJob) -> Chosen:
    """Trace, score and choose. Touches nothing."""
    recipe, units = job.recipe, job.units
    if units.whole_blocks:
        graph = trace(model, job.arguments)
        given: dict[str, Any] = {"batches": job.batches, "loss": job.loss, "example": job.example}
        curves = job.sensitivity if recipe.allocation == BY_CURVES else ()
        plan, notes = plan_blocks(model, graph, recipe, **given, curves=curves)
        return Chosen(graph, {}, plan, (*graph.notes, *notes))
    ranked = rank_units(model, job)
    graph, groups, scores = ranked.graph, ranked.groups, ranked.scores
    forced = forced_units(model, groups, recipe.force)
    for group, gone in forced.items():
        scores[group][gone] = -torch.inf
    widths: dict[str, Any] = {"round_to": units.round_to, "min_width": units.min_width}
    budget = None
    if job.sparsity is not None and job.allocation in ALLOCATIONS:
        if job.allocation == "uniform" and units.min_width == 1:
            _check_not_emptied(competitors(graph, groups, scores), job.sparsity, units)
        removed = select(graph, groups, scores, job.sparsity, scope=ALLOCATIONS[job.allocation], **widths)
    else:
        target = recipe.budget if job.sparsity is None else job.sparsity
        scope = job.sensitivity if job.allocation == BY_CURVES else ALLOCATIONS.get(job.allocation, BY_GAIN)
        where: dict[str, Any] = {"target": target, "scope": scope, "example": job.example}
        kept, budget = choose_counts(model, graph, groups, scores, **where, **widths)
        removed = lowest(groups, scores, kept)
    check_forced(graph, forced, removed)
    return Chosen(graph, removed, replace(make_plan(graph, model, removed), budget=budget), ranked.notes)


def _check_not_emptied(rivals: Iterable[Competitor], sparsity: float, units: Units) -> None:
    """Refuse a sparsity by which nothing would be left of a group. Where a least width is asked for, that stays."""
    emptied = [c for c in rivals if removed_count(c.units, sparsity) >= c.units]
    if emptied:
        names = ", ".join(f"{c.groups[0].name!r} ({c.units} units)" for c in emptied[:3]) + (", ..." if emptied[3:] else "")
        raise LayerError(
            f"sparsity={sparsity:g} would leave nothing of {names}. Lower it, leave them out with ignore=, or say how many "
            f"units shall stay at least: pattern={{'name': {units.name!r}, 'min_width': 2}}."
        )


def masks_of(model: nn.Module, plan: Plan) -> MaskSet:
    """The cuts of a plan as masks in the shapes of the original parameters: True where a weight is still there."""
    masks: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for c in (c for c in plan.cuts if c.tensor == name):
            line = torch.zeros(parameter.shape[c.dim], dtype=torch.bool)
            line[list(c.kept)] = True
            mask = masks.setdefault(name, torch.ones(parameter.shape, dtype=torch.bool))
            mask &= line.reshape([-1 if d == c.dim else 1 for d in range(parameter.dim())])
    for planned in plan.layers:
        masks.setdefault(planned.name, torch.full(planned.shape, bool(planned.kept)))
    return MaskSet(masks)


def _check(recipe: Recipe, units: Units) -> float | None:
    if recipe.sparsity is None and recipe.budget is None and not (units.whole_blocks and recipe.force):
        raise RecipeError(
            "sparsity is missing: give the fraction of units to cut, such as sparsity=0.5, or a budget such as '50% MACs'"
        )
    if recipe.groups is not None:
        raise RecipeError(f"groups are for patterns that mask weights; pattern {units.name!r} cuts units out. Leave them out.")
    if recipe.solver != "keep":
        raise RecipeError(
            f"pattern {units.name!r} cuts units out; solver {recipe.solver!r} repairs masked weights. Leave it out."
        )
    if units.whole_blocks:
        repair = None if recipe.repair == "none" else recipe.repair
        allocation = None if recipe.allocation == BY_CURVES else recipe.allocation
        for key, value in (("allocation", allocation), ("repair", repair)):
            if value is not None:
                raise RecipeError(
                    f"pattern 'layer' takes whole blocks out: {key}={value!r} has no meaning there. Leave it out."
                )
        return None if recipe.sparsity is None else check_sparsity(recipe.sparsity)
    if recipe.allocation is not None and recipe.allocation not in (known := [*ALLOCATIONS, BY_CURVES, BY_GAIN]):
        raise RecipeError(f"pattern {units.name!r} knows the allocations {', '.join(known)}; got {recipe.allocation!r}")
    if recipe.allocation == BY_GAIN and recipe.budget is None:
        raise RecipeError(f"allocation {BY_GAIN!r} weighs scores against what a budget saves: give a budget, not a sparsity")
    if recipe.steps > 1:
        raise RecipeError(
            f"pattern {units.name!r} is cut in one step, steps={recipe.steps}. Prune the result again to go further."
        )
    return None if recipe.sparsity is None else check_sparsity(recipe.sparsity)


def units_to_cut(graph: Graph, recipe: Recipe, units: Units) -> list[Group]:
    """The groups of units that a recipe cuts. Raises LayerError where there are none, and says why."""
    groups = choose_groups(graph, units.kinds, recipe.ignore)
    if recipe.layers is not None:
        wanted = recipe.layers
        groups = [g for g in groups if any(matches(p, m.tensor) for p in wanted for m in g.members)]
    if not groups:
        fixed = [f"{g.name}: {g.reason}" for g in graph.groups if g.reason and g.kind in units.kinds][:3]
        why = "; ".join(fixed) or f"the model has no units of kind {', '.join(units.kinds)}"
        raise LayerError(f"pattern {units.name!r}: there is nothing to cut. {why}.")
    return groups
