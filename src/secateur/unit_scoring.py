"""Scores of the units that a recipe cuts: by a criterion of weights folded over a unit's slices, or by one of whole units."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.criteria import CRITERIA, UNIT_CRITERIA
from secateur.data.batches import Batch, Batches, Loss
from secateur.errors import LayerError, NonFiniteError, RecipeError, UnknownName
from secateur.graph import Graph, Group, Member, combined, normalized, unit_scores
from secateur.layers import find_layers, non_finite_message
from secateur.patterns import Units
from secateur.recipe import Recipe
from secateur.registry import Entry, bind, name_of
from secateur.stats import collect
from secateur.stats.activity import Part, Site, activity
from secateur.stats.guard import listed
from secateur.types import LayerStats, UnitNeed, UnitStats
from secateur.vision_language.attention import attention_profile

_WHERE = {
    "outputs": "the weights that make them",
    "inputs": "linear layers or convolutions that read them",
    "norms": "a normalisation with a scale",
}


@dataclass(frozen=True)
class Scored:
    """The groups that the criterion can score, their scores ``[units]`` by id, and what the report shall say."""

    groups: list[Group]
    scores: dict[int, Tensor]
    notes: tuple[str, ...]


def criterion_entry(recipe: Recipe, *, blocks: bool = False) -> Entry[Any]:
    """The criterion of a recipe whose pattern cuts units, from one registry or the other.

    Raises UnknownName where neither has it, and RecipeError where it scores blocks and blocks are not what is cut, or the
    other way round, and where the recipe reduces scores of weights that the criterion does not give.
    """
    name = name_of(recipe.criterion)
    if name not in CRITERIA and name not in UNIT_CRITERIA:
        raise UnknownName("criterion", name, [*CRITERIA, *UNIT_CRITERIA])
    registry = CRITERIA if name in CRITERIA else UNIT_CRITERIA
    bind(registry, recipe.criterion)  # checks the options
    entry = registry[name]
    if registry is CRITERIA:
        return entry
    if (entry.facts["on"] == "blocks") != blocks:
        what = "units, for patterns such as 'channel'" if blocks else "whole blocks, for the pattern 'layer'"
        raise RecipeError(f"criterion {name!r} scores {what}. Take another criterion, or that pattern.")
    if recipe.reduction is not None:
        raise RecipeError(f"criterion {name!r} scores whole units: there is nothing to reduce. Leave the reduction out.")
    return entry


def reduction_of(recipe: Recipe) -> str:
    """How the saliencies of a unit's weights, or a block's, make its score: their mean, unless the recipe or criterion says."""
    own = CRITERIA[name_of(recipe.criterion)].facts["reduction"]
    return recipe.reduction or ("mean" if own == "sum" else own)


def score_units(
    model: nn.Module,
    groups: Sequence[Group],
    recipe: Recipe,
    units: Units,
    *,
    batches: Batches | None,
    loss: Loss | None,
    example: Batch,
    stats: Mapping[str, LayerStats] | None = None,
) -> Scored:
    """Score the units of `groups` by the recipe's criterion. Groups that it cannot see are left alone, and a note names them.

    `stats` of the weights are collected from `batches` where they are not given.

    Raises LayerError where none can be scored, and NonFiniteError for scores that are NaN or infinite.
    """
    entry = criterion_entry(recipe)
    if entry.name in UNIT_CRITERIA:
        scores, notes = _by_units(model, groups, recipe, units, batches, loss)
        missing = f"{_WHERE[entry.facts['on']]}, which criterion {entry.name!r} looks at"
    else:
        scores, notes = _by_elements(model, groups, recipe, units, batches, loss, example, stats)
        missing = f"weights of linear, convolution or recurrent layers, which criterion {entry.name!r} looks at"
    seen = [g for g in groups if scores.keys() >= {g.id, *g.ties}]
    left = [g.name for g in groups if g not in seen]
    if left:
        notes = (*notes, f"these are left alone, as their units have no {missing}: {listed(left)}")
    if not seen:
        raise LayerError(f"there is nothing to cut: no group of units has {missing}. Take another criterion.")
    for group in seen:
        if not torch.isfinite(scores[group.id]).all():
            raise NonFiniteError(non_finite_message(f"the scores of {group.name!r} by {entry.name!r}", scores[group.id]))
    how = units.normalize
    if how == "auto":
        how = "mean" if recipe.allocation == "global" and not entry.facts.get("comparable") else "none"
    return Scored(seen, {g.id: normalized(scores[g.id], how) for g in seen}, notes)


def forced_units(model: nn.Module, groups: Iterable[Group], force: Sequence[str]) -> dict[int, list[int]]:
    """The units that ``layer[3,5]`` name, by group: those of the layer's outputs 3 and 5.

    Raises RecipeError for what does not read so, and UnknownName for a layer of whose outputs nothing can be cut.
    """
    layers = find_layers(model)[0]
    makers = {
        m.tensor: (g, m) for g in groups for m in g.members if m.tensor in layers and m.dim == layers[m.tensor].stored_dim(0)
    }  # fmt: skip
    named = {alias: found for name, found in makers.items() for alias in (name, name.rpartition(".")[0])}
    forced: dict[int, list[int]] = {}
    for text in force:
        match = re.fullmatch(r"(.+)\[(\d+(?:,\d+)*)\]", text)
        if match is None:
            raise RecipeError(f"force={text!r}: units are named by a layer and its outputs, as in 'layer1.0.conv1[3,5]'")
        if match[1] not in named:
            raise UnknownName("layer", match[1], named)
        group, member = named[match[1]]
        unit_of = dict(zip(member.indices.tolist(), member.units.tolist(), strict=True))
        for index in map(int, match[2].split(",")):
            if index not in unit_of:
                raise RecipeError(
                    f"force={text!r}: output {index} of {match[1]!r} cannot be cut; there are {len(unit_of)} that can"
                )
            forced.setdefault(group.id, []).append(unit_of[index])
    return forced


def check_forced(graph: Graph, forced: Mapping[int, Sequence[int]], removed: Mapping[int, Sequence[int]]) -> None:
    """Raise RecipeError where units that have to go are not among those that are removed."""
    for group, units in forced.items():
        if not set(units) <= set(removed.get(group, ())):
            name = graph.groups[group].name
            raise RecipeError(
                f"force names {len(units)} units of {name!r}, of which fewer go. Raise the sparsity, or lower the budget."
            )


def _by_elements(
    model: nn.Module,
    groups: Iterable[Group],
    recipe: Recipe,
    units: Units,
    batches: Batches | None,
    loss: Loss | None,
    example: Batch,
    stats: Mapping[str, LayerStats] | None,
) -> tuple[dict[int, Tensor], tuple[str, ...]]:
    """The criterion's saliency of every weight that belongs to a group, folded into units."""
    name, score = bind(CRITERIA, recipe.criterion)
    members = {m.tensor for g in groups for m in g.members}
    layers = {n: layer for n, layer in find_layers(model)[0].items() if n in members}
    notes: tuple[str, ...] = ()
    if stats is None:
        needs = CRITERIA[name].facts["needs"]
        found = collect(model, layers, needs, batches=batches, loss=loss, seed=recipe.seed, example=example)
        stats, notes = found.layers, found.notes
    saliency = {n: score(stats[n]) for n in layers}
    how = reduction_of(recipe)
    known = [g for g in groups if any(m.tensor in saliency for m in g.members)]
    return unit_scores(model, known, saliency, how, units.combine), notes  # type: ignore[arg-type]


def _by_units(
    model: nn.Module, groups: Iterable[Group], recipe: Recipe, units: Units, batches: Batches | None, loss: Loss | None
) -> tuple[dict[int, Tensor], tuple[str, ...]]:
    """The criterion's score of the units in each tensor that it looks at, combined over the tensors of a group."""
    name, score = bind(UNIT_CRITERIA, recipe.criterion)
    facts = UNIT_CRITERIA[name].facts
    views = _views(model, groups, facts["on"])
    found: Mapping[str, Mapping[Any, Tensor]] = {}
    if facts["needs"] == {UnitNeed.VISUAL_RATIO}:
        assert batches is not None
        found = _visual_ratios(model, views, batches, recipe.seed)
    elif facts["needs"] and views:
        assert batches is not None
        found = activity(model, _sites(views, facts["on"]), facts["needs"], batches, loss=loss, seed=recipe.seed)
    parts: dict[int, list[Tensor]] = {}
    for view in views:
        if not facts["needs"] or view.name in found:
            values = {need.value: tensor for need, tensor in found.get(view.name, {}).items()}
            stats = UnitStats(view.member.tensor, view.weight(), **values)
            parts.setdefault(view.group.id, []).append(score(stats).double().cpu())
    how = "mean" if units.combine == "together" else units.combine
    return {g: combined(p, how) for g, p in parts.items()}, ()


def _visual_ratios(model: nn.Module, views: Iterable[_View], batches: Batches, seed: int) -> dict[str, dict[UnitNeed, Tensor]]:
    """``[units, samples]`` of the heads of every view: of the attention module that the view's weight is of, or is within.

    A head of keys that several heads of queries share counts with their mean. Raises LayerError for units that are no heads.
    """
    profile = attention_profile(model, batches, seed=seed)
    found: dict[str, dict[UnitNeed, Tensor]] = {}
    for view in views:
        if view.group.kind != "head":
            raise LayerError(f"visual attention is of heads, and {view.group.name!r} are units of kind {view.group.kind!r}")
        parts = view.member.tensor.split(".")[:-1]
        above = [".".join(parts[:i]) for i in range(len(parts), 0, -1)][:2]
        name = next((n for n in above if n in profile.shares), None)
        if name is not None:
            ratio = profile.ratio(name).t()
            found[view.name] = {UnitNeed.VISUAL_RATIO: ratio.reshape(view.group.units, -1, ratio.shape[1]).mean(1)}
    return found


@dataclass(frozen=True)
class _View:
    """The units of one group in one of its tensors, and the module that the tensor belongs to."""

    group: Group
    member: Member
    module: nn.Module
    tensor: Tensor

    @property
    def name(self) -> str:
        """Unique among the views of a model."""
        return f"{self.member.tensor!r}, dimension {self.member.dim}, group {self.group.id}, role {self.member.role}"

    @torch.no_grad()
    def weight(self) -> Tensor:
        """``[units, elements]``, float32: the slices of every unit, one after the other."""
        units, indices = torch.from_numpy(self.member.units), torch.from_numpy(self.member.indices)
        order = torch.argsort(units, stable=True)
        owner = units[order]
        place = torch.arange(len(owner)) - torch.searchsorted(owner, owner)
        slices = self.tensor.float().movedim(self.member.dim, 0)[indices[order].to(self.tensor.device)]
        slices = slices.reshape(len(slices), -1)
        out = slices.new_zeros(self.group.units, int(place.max()) + 1, slices.shape[1])
        out[owner, place] = slices
        return out.flatten(1)

    def part(self) -> Part:
        """Which channels at the module are of which unit; a grouped convolution reads an input of each group by one index."""
        units, indices = torch.from_numpy(self.member.units), torch.from_numpy(self.member.indices)
        groups = getattr(self.module, "groups", 1) if self.tensor.dim() > 2 and self.member.dim == 1 else 1
        shifts = torch.arange(groups) * self.tensor.shape[self.member.dim]
        return Part(self.name, (indices + shifts[:, None]).flatten(), units.repeat(groups), self.group.units)


def _views(model: nn.Module, groups: Iterable[Group], on: str) -> list[_View]:
    """The tensors of each group that a criterion on ``outputs``, ``inputs`` or ``norms`` looks at."""
    layers = find_layers(model)[0]
    tensors = dict(model.named_parameters(remove_duplicate=False))
    fits: Callable[[Member, nn.Module], bool] = {
        "outputs": lambda m, _: m.tensor in layers and m.dim == layers[m.tensor].stored_dim(0),
        "inputs": lambda m, _: m.tensor in layers and m.dim == layers[m.tensor].stored_dim(1) and layers[m.tensor].reads_input,
        "norms": lambda m, module: _is_scale(module, m.tensor, tensors[m.tensor]),
    }[on]
    views = []
    for group in groups:
        for member in group.members:
            if member.tensor in tensors:
                module = model.get_submodule(member.tensor.rpartition(".")[0])
                if fits(member, module):
                    views.append(_View(group, member, module, tensors[member.tensor].detach()))
    return views


def _sites(views: Iterable[_View], on: str) -> list[Site]:
    by_module: dict[int, list[_View]] = {}
    for view in views:
        by_module.setdefault(id(view.module), []).append(view)
    return [Site(v[0].module, tuple(x.part() for x in v), output=on == "norms") for v in by_module.values()]


def _is_scale(module: nn.Module, name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 1 and name.endswith("weight") and "Norm" in type(module).__name__
