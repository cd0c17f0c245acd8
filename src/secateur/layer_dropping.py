"""Whole blocks of a network that are taken out: which ones, by a criterion of weights or of blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from secateur.budgets.amount import parse_budget
from secateur.budgets.blocks import BlockCost, BlockProblem, cheapest, fit_blocks, fit_blocks_latency
from secateur.budgets.latency import Stopwatch
from secateur.criteria import CRITERIA, UNIT_CRITERIA
from secateur.data.batches import Batch, Batches, Loss, arguments_of, default_loss, device_of, size_of, to_device
from secateur.errors import LayerError, NonFiniteError, RecipeError, UnknownName
from secateur.graph import Graph, Residual, block_importance, bypassing, plan_without, removable_blocks
from secateur.layers import Layer, find_layers, matches
from secateur.measure.sensitivity import worth_of_wholes
from secateur.patterns import reduce
from secateur.progress import track
from secateur.recipe import Recipe
from secateur.registry import bind
from secateur.select import removed_count, top
from secateur.stats import collect
from secateur.stats.gradients import scalar
from secateur.stats.guard import ordinary, untouched
from secateur.types import LayerPlan, Plan, Sensitivity, UnitNeed, UnitStats
from secateur.unit_scoring import criterion_entry, reduction_of


def plan_blocks(
    model: nn.Module,
    graph: Graph,
    recipe: Recipe,
    *,
    batches: Batches | None,
    loss: Loss | None,
    example: Batch,
    curves: Sequence[Sensitivity] = (),
) -> tuple[Plan, tuple[str, ...]]:
    """The plan that takes the recipe's fraction of the blocks out, those that it forces among them, and notes for the report.

    Counted are the removable blocks that `layers` and `ignore` leave open: of these the nearest whole number goes, halves up,
    in `steps` rounds. After each, what is left is scored anew with the chosen ones bypassed. Of a budget those go that
    together are worth least and whose absence keeps it. Without a sparsity or a budget the forced blocks alone go. `curves`
    of a scan, if there are any, say what a block is worth instead of the criterion. Touches nothing.

    Raises LayerError where there is no such block, where all of them would go, and where the sparsity is too small to take one;
    UnknownName for a name that matches none; RecipeError where more are forced than go, or a block has no curve; BudgetError.
    """
    every = removable_blocks(model, graph)
    blocks = open_blocks(every, recipe)
    names = [b.name for b in blocks]
    forced = [n for n in names if any(matches(p, n) for p in recipe.force)]
    rounds = _Rounds(model, blocks, recipe, batches, loss, example, curves)
    budget = None
    if recipe.budget is None:
        gone = rounds.lowest(forced, _how_many(names, forced, recipe))
    else:
        amount = parse_budget(recipe.budget)
        most = len(names) - (len(names) == len(every))  # of all the model's blocks one stays
        problem = BlockProblem(model, graph, names, partial(rounds.within, forced, most), one_stays=most < len(names))
        if amount.unit == "ms":
            gone, budget = fit_blocks_latency(problem, amount, Stopwatch(model, example))
        else:
            gone, budget = fit_blocks(problem, amount)
    plan = plan_without(graph, model, [n for n in names if n in gone])
    notes = (*rounds.notes, f"these blocks are taken out: {', '.join(plan.dropped) or 'none'}")
    return replace(plan, layers=_layers(model, plan.dropped), budget=budget), notes


def _how_many(names: Sequence[str], forced: Sequence[str], recipe: Recipe) -> int:
    """How many blocks the sparsity takes, or as many as are forced where there is none."""
    count = len(forced) if recipe.sparsity is None else removed_count(len(names), recipe.sparsity)
    if len(forced) > count:
        raise RecipeError(
            f"force names {len(forced)} blocks ({', '.join(forced)}), but of {len(names)} sparsity={recipe.sparsity} takes "
            f"{count}. Raise it to {len(forced) / len(names):.3f}, or leave it out."
        )
    if not count:
        raise LayerError(
            f"of {len(names)} blocks sparsity={recipe.sparsity} takes none. The least that takes one is {0.5 / len(names):.3f}."
        )
    return count


class _Rounds:
    """Chooses blocks in the recipe's number of steps; after each, what is left is scored anew with the chosen ones bypassed."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Residual],
        recipe: Recipe,
        batches: Batches | None,
        loss: Loss | None,
        example: Batch,
        curves: Sequence[Sensitivity],
    ):
        self._blocks, self._steps = blocks, recipe.steps
        self._scores = partial(_scores, model, recipe=recipe, batches=batches, loss=loss, example=example)
        self._worth = worth_of_wholes(curves)
        if curves and (missing := [b.name for b in blocks if b.name not in self._worth]):
            raise RecipeError(
                f"there is no sensitivity curve of {missing[0]!r} ({len(missing)} of {len(blocks)} blocks have none): scan "
                "with the same pattern, layers and ignore."
            )
        self._known: dict[tuple[str, ...], Tensor] = {}
        self.notes: list[str] = []

    def lowest(self, forced: Sequence[str], count: int) -> list[str]:
        """`count` blocks, the forced ones among them."""
        gone = list(forced)
        for step in range(1, self._steps + 1):
            wanted = len(forced) + removed_count(count - len(forced), step / self._steps) - len(gone)
            if wanted:
                left, scores = self._left(gone)
                stays = top(scores[None], torch.tensor([len(left) - wanted]))[0]
                gone += [name for name, stay in zip(left, stays.tolist(), strict=True) if not stay]
        return gone

    def within(self, forced: Sequence[str], most: int, cost: BlockCost, limit: float) -> list[str] | None:
        """Blocks that are worth least, `most` of them and the forced ones among them, without which `cost` is within `limit`.

        None where that is not enough.
        """
        for steps in dict.fromkeys((self._steps, 1)):  # step by step may end where all at once would not
            gone: list[str] | None = list(forced)
            for step in range(1, steps + 1):
                target = limit if step == steps else cost(forced) - (cost(forced) - limit) * step / steps
                gone = None if gone is None else self._next(gone, cost, target)
            if gone is not None and len(gone) <= most:
                return gone
        return None

    def _next(self, gone: list[str], cost: BlockCost, limit: float) -> list[str] | None:
        now = cost(gone)
        if now <= limit:
            return gone
        left, scores = self._left(gone)
        chosen = cheapest(scores.tolist(), [now - cost([*gone, name]) for name in left], now - limit)
        return None if chosen is None else [*gone, *(left[i] for i in chosen)]

    def _left(self, gone: Sequence[str]) -> tuple[list[str], Tensor]:
        """The blocks that are left, and their scores with those `gone` bypassed."""
        key = tuple(sorted(gone))
        left = [b for b in self._blocks if b.name not in gone]
        if key not in self._known:
            if self._worth:
                self._known[key] = torch.tensor([self._worth[b.name] for b in left])
            else:
                self._known[key], said = self._scores(left, gone)
                self.notes += [n for n in said if n not in self.notes]
        return [b.name for b in left], self._known[key]


def open_blocks(blocks: Sequence[Residual], recipe: Recipe) -> list[Residual]:
    """Of `blocks` those that the recipe's `layers` and `ignore` leave open. Raises where that is none, or a name fits none."""
    for pattern in (*(recipe.layers or ()), *recipe.ignore, *recipe.force):
        if not any(matches(pattern, b.name) for b in blocks):
            raise UnknownName("block", pattern, [b.name for b in blocks])
    wanted = [b for b in blocks if recipe.layers is None or any(matches(p, b.name) for p in recipe.layers)]
    found = [b for b in wanted if not any(matches(p, b.name) for p in recipe.ignore)]
    if not found:
        raise LayerError(
            "pattern 'layer': there is nothing to take out. A block is a member of a ModuleList or Sequential with an output "
            "of its input's shape and a shortcut around it."
        )
    for name in (p for p in recipe.force if not any(matches(p, b.name) for b in found)):
        raise RecipeError(f"force={name!r} names a block that ignore or layers leaves alone")
    return found


def _scores(
    model: nn.Module,
    blocks: Sequence[Residual],
    gone: Sequence[str],
    recipe: Recipe,
    *,
    batches: Batches | None,
    loss: Loss | None,
    example: Batch,
) -> tuple[Tensor, tuple[str, ...]]:
    """``[blocks]``, with the blocks that are `gone` bypassed."""
    entry = criterion_entry(recipe, blocks=True)
    names = [b.name for b in blocks]
    if entry.name in CRITERIA:
        with bypassing(model, gone):
            return _by_elements(model, names, recipe, batches, loss, example)
    assert batches is not None
    values = {}
    if UnitNeed.BLOCK_CHANGE in entry.facts["needs"]:
        with bypassing(model, gone):
            change = block_importance(model, blocks, _examples(model, batches))
        values["block_change"] = torch.tensor([change[n] for n in names])
    if UnitNeed.BLOCK_LOSS in entry.facts["needs"]:
        values["block_loss"] = _losses(model, names, gone, batches, loss or default_loss, recipe.seed)
    _, score = bind(UNIT_CRITERIA, recipe.criterion)
    return score(UnitStats("blocks", torch.empty(len(names), 0), **values)), ()


def _by_elements(
    model: nn.Module, names: Sequence[str], recipe: Recipe, batches: Batches | None, loss: Loss | None, example: Batch
) -> tuple[Tensor, tuple[str, ...]]:
    """The saliencies of all weights of a block, made one number by the recipe's reduction: their mean by default."""
    name, score = bind(CRITERIA, recipe.criterion)
    layers = find_layers(model)[0]
    own = {block: {n: layer for n, layer in layers.items() if n.startswith(f"{block}.")} for block in names}
    if empty := [block for block in names if not own[block]]:
        raise LayerError(
            f"the block {empty[0]!r} has no weights that criterion {name!r} could score. Leave it out with ignore=."
        )
    wanted: dict[str, Layer] = {n: layer for inside in own.values() for n, layer in inside.items()}
    found = collect(
        model, wanted, CRITERIA[name].facts["needs"], batches=batches, loss=loss, seed=recipe.seed, example=example
    )  # fmt: skip
    how = reduction_of(recipe)
    saliency = {n: score(stats).flatten().double() for n, stats in found.layers.items()}
    scores = [reduce(torch.cat([saliency[n] for n in own[block]])[None, None], how)[0, 0] for block in names]
    return torch.stack(scores).cpu(), found.notes


def _losses(model: nn.Module, names: Sequence[str], gone: Sequence[str], batches: Batches, loss: Loss, seed: int) -> Tensor:
    """How much the mean loss rises without each of the blocks, `gone` being bypassed in any case."""
    with bypassing(model, gone):
        before = _mean_loss(model, batches, loss, seed)
    rises = []
    for name in track(names, "drop and measure"):
        with bypassing(model, [*gone, name]):
            rises.append(_mean_loss(model, batches, loss, seed) - before)
    return torch.tensor(rises, dtype=torch.float32)


def _mean_loss(model: nn.Module, batches: Batches, loss: Loss, seed: int) -> float:
    total, samples = 0.0, 0
    with untouched(model, [], seed), torch.no_grad():
        for batch in batches:
            size = size_of(batch)
            total += float(scalar(loss(model, ordinary(batch)))) * size
            samples += size
    if not math.isfinite(total):
        raise NonFiniteError(
            f"the loss of the model with blocks bypassed is {total / samples}. Leave the block out with ignore=."
        )
    return total / samples


def _examples(model: nn.Module, batches: Iterable[Batch]) -> Iterable[object]:
    """Batches without their labels, on the model's device."""
    for batch in batches:
        yield arguments_of(to_device(batch, device_of(model)))


def _layers(model: nn.Module, dropped: Sequence[str]) -> tuple[LayerPlan, ...]:
    """All weights of linear, convolution and recurrent layers: those in the blocks go."""
    plans = []
    for name, layer in find_layers(model)[0].items():
        block = next((b for b in dropped if name.startswith(f"{b}.")), None)
        shape, n = tuple(layer.parameter.shape), layer.parameter.numel()
        plans.append(LayerPlan(name, shape, n, 0 if block else n, "layer", f"{block} is taken out" if block else ""))
    return tuple(plans)
