"""Groups of coupled units, each of which a scan cuts out alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from secateur.data.batches import Batch, Batches, Loss
from secateur.errors import RecipeError
from secateur.graph import cut, kept_counts, lowest, make_plan
from secateur.graph.choose import Competitor, competitors, named
from secateur.measure.cache import fingerprint
from secateur.measure.scan import Subject
from secateur.patterns import Units
from secateur.recipe import Recipe
from secateur.structured import Ranked, prepare_units, rank_units


def units_to_scan(
    model: nn.Module, units: Units, *, batches: Batches | None, loss: Loss | None, example: Batch | None, **keys: Any
) -> dict[str, Subject]:
    """Every group of units that `sc.prune` would cut, by name; groups that are tied are one."""
    if units.whole_blocks:
        raise RecipeError(
            f"pattern {units.name!r} takes whole blocks out, of which there are no fractions to scan: criterion 'block_loss' "
            "measures every block by itself"
        )
    keys = {**keys, "ignore": tuple(keys["ignore"]), "layers": None if keys["layers"] is None else tuple(keys["layers"])}
    recipe = Recipe.make({"sparsity": 0.5, **{k: v for k, v in keys.items() if v is not None}})
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
