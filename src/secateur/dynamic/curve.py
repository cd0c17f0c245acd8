"""The curve of a dial: quality and the cost of every input, budget by budget, as a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from secateur.errors import BudgetError, RecipeError
from secateur.measure.quality import Evaluate, qualities
from secateur.measure.sizes import sizes
from secateur.progress import track
from secateur.types import DialPoint, Measurement, Report

if TYPE_CHECKING:
    from secateur.dynamic.module import Dynamic

BINS = 20


def dial_report(gated: Dynamic, evaluate: Evaluate, budgets: Sequence[float], title: str) -> Report:
    """A report with a `DialPoint` for each budget that the gates can meet; the budget is then what it was.

    Before is the model at budget 1, after at its own budget. Raises RecipeError where no budget can be met.
    """
    own, points, notes = gated.budget, list[DialPoint](), list[str]()
    quality: dict[float, dict[str, float]] = {}
    try:
        for budget in track(sorted({1.0, own, *budgets}, reverse=True), "budgets"):
            try:
                gated.budget = budget
            except BudgetError as error:
                notes.append(str(error))
                continue
            with gated.recording() as costs:
                quality[budget] = qualities(evaluate, gated)
            if not len(costs):
                raise RecipeError("evaluate did not run the model: there is no input whose cost could be shown")
            places = (costs.shares * BINS).long().clamp(max=BINS - 1)
            counts = torch.bincount(places, minlength=BINS).tolist()
            points.append(DialPoint(budget, costs.mean, next(iter(quality[budget].values())), tuple(counts), budget == own))
    finally:
        gated.budget = own
    found = sizes(gated)
    before, after = (Measurement(found.parameters, found.nonzeros, found.bytes_memory, quality=quality[b]) for b in (1.0, own))
    metric = next(iter(quality[1.0]))
    return Report(title, before, after, metric=metric, notes=tuple(notes), dial=tuple(points))
