"""What gradual pruning removes: weights under masks, or units that are cut out at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.criteria import UNIT_CRITERIA
from secateur.data.batches import Batch, arguments_of
from secateur.errors import RecipeError
from secateur.graph import cut_checked, make_plan, select, trace
from secateur.layers import Layer, find_layers
from secateur.patterns import Units
from secateur.recipe import Recipe
from secateur.selection import prunable, resolve, target_sparsity
from secateur.sparsity import check_sparsity
from secateur.structured import ALLOCATIONS, masks_of, units_to_cut
from secateur.train.regrow import REGROW, Choice, make_regrow
from secateur.types import LayerStats, MaskSet, Need, Plan
from secateur.unit_scoring import criterion_entry, score_units


class Subject(Protocol):
    """What `Gradual` needs to know of what it prunes."""

    layers: dict[str, Layer]  #: whose gradients the method looks at
    needs: frozenset[Need]  #: of the criterion and of the rule of regrowth
    removed: str  #: what removed weights do: "zero", "frozen" or "trained"
    target: float  #: sparsity
    masks: MaskSet  #: the masks in force

    def sparsity(self) -> float:
        """Fraction removed so far."""
        ...

    def choose(self, stats: Mapping[str, LayerStats], sparsity: float, progress: float, seed: int) -> MaskSet:
        """New masks, which are in force from now on."""
        ...

    def needed(self) -> frozenset[Need]:
        """The statistics that the next choice looks at."""
        ...

    def names(self) -> list[str]:
        """Of what is pruned, by which a state is known as its own."""
        ...

    def state(self) -> dict[str, Any]:
        """What `restore` goes on from, beside the masks."""
        ...

    def restore(self, masks: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from masks and a state."""
        ...


class Weights:
    """Single weights, or patterns of them, in the layers of a model."""

    def __init__(self, model: nn.Module, recipe: Recipe, schedule: Callable[[float, float], float]):
        method = self._method = resolve(
            criterion=recipe.criterion, pattern=recipe.pattern, allocation=recipe.allocation, reduction=recipe.reduction
        )
        name, self._regrow = make_regrow(recipe.regrow)
        self.removed = REGROW[name].facts["removed"]
        self._while_growing = frozenset(REGROW[name].facts["needs"])
        self.needs = method.needs | self._while_growing
        check_needs(method.criterion_name, method.needs)
        self.target = target_sparsity(recipe.sparsity, method.pattern)
        if method.pattern.sparsity is not None and schedule(0.0, self.target) != self.target:
            raise RecipeError(
                f"pattern {method.pattern.name} has one sparsity and nothing in between, so it cannot grow along schedule "
                f"{recipe.schedule!r}. Use a schedule that prunes at once, at begin."
            )
        self.layers, _ = prunable(model, method.pattern, layers=recipe.layers, ignore=recipe.ignore)
        self.masks = MaskSet({n: _all_kept(layer.parameter) for n, layer in self.layers.items()})

    def sparsity(self) -> float:
        """Fraction of the weights removed, over the layers that are pruned."""
        return MaskSet({name: self.masks[name] for name in self.layers}).sparsity()

    def choose(self, stats: Mapping[str, LayerStats], sparsity: float, progress: float, seed: int) -> MaskSet:
        """New masks by the rule of regrowth."""
        self.masks = self._regrow(Choice(self.layers, stats, self._method, sparsity, self.masks, progress, seed))
        return self.masks

    def needed(self) -> frozenset[Need]:
        """What the rule of regrowth needs only where there is something to grow."""
        grows = any(not mask.all() for mask in self.masks.values())
        return self.needs if grows else self._method.needs

    def names(self) -> list[str]:
        """Of the weights; biases have masks only sometimes."""
        return list(self.layers)

    def state(self) -> dict[str, Any]:
        """Nothing: the masks say it all."""
        return {}

    def restore(self, masks: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from masks."""
        self.masks = MaskSet(masks)


class CutUnits:
    """Channels, neurons or heads with all that depends on them. Masked while the training lasts, and then cut out."""

    def __init__(self, model: nn.Module, recipe: Recipe, units: Units, example: Batch | None):
        if example is None:
            raise RecipeError(f"pattern {units.name!r} follows a batch through the model: pass example=")
        if units.whole_blocks:
            raise RecipeError(
                f"pattern {units.name!r} takes whole blocks out, which have no masks: use sc.prune, or "
                "secateur.train.layerdrop in the training"
            )
        if barred := sorted({"width", "head_dim"} & set(units.kinds)):
            raise RecipeError(
                f"gradual pruning masks units until they are cut, and a normalisation or the scale of attention over "
                f"{barred[0]} would see the zeros. Cut them with sc.prune, in several rounds."
            )
        if recipe.sparsity is None:
            raise RecipeError("sparsity is missing: give the fraction of units to remove, such as sparsity=0.5")
        entry = criterion_entry(recipe)
        self.needs = frozenset(entry.facts["needs"])
        check_needs(entry.name, self.needs)
        name, _ = make_regrow(recipe.regrow)
        self.removed = REGROW[name].facts["removed"]
        if name != "none" and (name != "frozen" or entry.name in UNIT_CRITERIA):
            raise RecipeError(
                f"regrow {name!r} is for single weights. Units stay removed, or are 'frozen' under a criterion of weights."
            )
        if recipe.allocation is not None and recipe.allocation not in ALLOCATIONS:
            raise RecipeError(f"pattern {units.name!r} knows the allocations {', '.join(ALLOCATIONS)} in gradual pruning")
        self._model, self._recipe, self._units = model, recipe, units
        self._example, self._arguments = example, arguments_of(example)
        self.target = check_sparsity(recipe.sparsity)
        self._graph = trace(model, self._arguments, cut_outputs=units.outputs)
        self._groups = units_to_cut(self._graph, recipe, units)
        members = {m.tensor for g in self._groups for m in g.members}
        self.layers = {n: la for n, la in find_layers(model)[0].items() if n in members}
        self._gone: dict[int, list[int]] = {}
        self.masks = MaskSet({})

    def sparsity(self) -> float:
        """Fraction of the units removed."""
        return sum(map(len, self._gone.values())) / sum(g.units for g in self._groups)

    def choose(self, stats: Mapping[str, LayerStats], sparsity: float, progress: float, seed: int) -> MaskSet:
        """Masks of all tensors that the removed units have slices in."""
        known = {"batches": None, "loss": None, "example": self._example, "stats": stats}
        found = score_units(self._model, self._groups, self._recipe, self._units, **known)  # type: ignore[arg-type]
        scores = dict(found.scores)
        if self.removed == "zero":
            for group, units in self._gone.items():
                scores[group][units] = -torch.inf
        scope = ALLOCATIONS[self._recipe.allocation or "uniform"]  # type: ignore[index]
        widths: dict[str, Any] = {"round_to": self._units.round_to, "min_width": self._units.min_width, "scope": scope}
        self._gone = select(self._graph, found.groups, scores, sparsity, **widths)
        self.masks = masks_of(self._model, self.plan())
        return self.masks

    def needed(self) -> frozenset[Need]:
        """What the criterion needs."""
        return self.needs

    def plan(self) -> Plan:
        """What `cut` would remove now."""
        return make_plan(self._graph, self._model, self._gone)

    def cut(self) -> tuple[nn.Module, Plan]:
        """The smaller model, and the plan that makes it; checked against the masked model on the example."""
        plan = self.plan()
        return cut_checked(self._model, plan, self._graph, self._gone, self._arguments).model, plan

    def names(self) -> list[str]:
        """Of the groups of units."""
        return [f"{g.name} ({g.units} {g.kind})" for g in self._groups]

    def state(self) -> dict[str, Any]:
        """Units that are gone, by group."""
        return {"gone": {str(group): list(units) for group, units in self._gone.items()}}

    def restore(self, masks: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from masks and the units that are gone."""
        self.masks = MaskSet(masks)
        self._gone = {int(group): list(units) for group, units in state["gone"].items()}


def check_needs(criterion: str, needs: frozenset[Any]) -> None:
    """Raise RecipeError where a criterion needs what no training step gives."""
    if beyond := sorted(need.value for need in needs if not (isinstance(need, Need) and need.training)):
        raise RecipeError(
            f"criterion {criterion!r} needs {', '.join(beyond)}, which a training step does not give. "
            "Choose one of weights or gradients for gradual pruning, or use sc.prune with several steps."
        )


def _all_kept(parameter: Tensor) -> Tensor:
    return torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
