"""Groups of coupled units, each of which a scan cuts out alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from secateur.data.batches import Batch, Batches, Loss, arguments_of
from secateur.errors import RecipeError
from secateur.graph import cut, kept_counts, lowest, make_plan, removable_blocks, trace
from secateur.graph.blocks import plan_without
from secateur.graph.choose import Competitor, competitors, named
from secateur.layer_dropping import open_blocks
from secateur.measure.cache import fingerprint
from secateur.measure.scan import Subject
from secateur.patterns import Units
from secateur.recipe import Recipe
from secateur.structured import Ranked, prepare_units, rank_units


def units_to_scan(
    model: nn.Module, units: Units, *, batches: Batches | None, loss: Loss | None, example: Batch | None, **keys: Any
) -> dict[str, Subject]:
    """Every group of units that `sc.prune` would cut, by name; groups that are tied are one. Or every block it may take out."""
    keys = {**keys, "ignore": tuple(keys["ignore"]), "layers": None if keys["layers"] is None else tuple(keys["layers"])}
    recipe = Recipe.make({"sparsity": 0.5, **{k: v for k, v in keys.items() if v is not None}})
    if units.whole_blocks:
        return _blocks_to_scan(model, recipe, batches, example)
    job = prepare_units(model, recipe, units, data=batches, train=None, loss=loss, example=example)
    ranked = rank_units(model, job)
    rivals = named(competitors(ranked.graph, ranked.groups, ranked.scores))
    return {name: _subject(model, ranked, rival, units) for name, rival in rivals.items()}


def _subject(model: nn.Module, ranked: Ranked, rival: Competitor, units: Units) -> Subject:
    widths: dict[str, Any] = {"round_to": units.round_to, "min_width": units.min_width}

    @contextmanager
    def pruned(sparsity: float) -> Iterator[nn.Module]:
        kept = kept_counts(ranked.graph, rival.groups, ranked.scores, sparsity, **widths)
        yield cut(model, make_plan(ranked.graph, model, lowest(rival.groups, ranked.scores, kept)))

    scores = (ranked.scores[g.id] for g in rival.groups)
    return Subject(pruned, fingerprint(*(m.tensor for g in rival.groups for m in g.members), *scores))


def _blocks_to_scan(model: nn.Module, recipe: Recipe, batches: Batches | None, example: Batch | None) -> dict[str, Subject]:
    """Every block that may be taken out. What it is worth is what is measured: no criterion has a part in it."""
    if example is None and batches is None:
        raise RecipeError("pattern 'layer' follows a batch through the model: pass example= or data=")
    first = next(iter(batches)) if example is None and batches is not None else example
    graph = trace(model, arguments_of(first))

    @contextmanager
    def without(_: float, name: str) -> Iterator[nn.Module]:
        yield cut(model, plan_without(graph, model, [name]))

    return {b.name: Subject(partial(without, name=b.name), "") for b in open_blocks(removable_blocks(model, graph), recipe)}
