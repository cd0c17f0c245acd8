"""Budgets of patterns that mask weights: the sparsity at which nonzero parameters, or their multiply-adds, keep to them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from secateur.budgets.amount import parse_budget
from secateur.errors import BudgetError, RecipeError
from secateur.job import Job
from secateur.measure.macs import macs
from secateur.measure.sizes import sizes
from secateur.selection import Scores
from secateur.types import Budget

log = logging.getLogger("secateur")


def within_budget(job: Job, model: nn.Module) -> tuple[Job, Budget | None]:
    """The job with the sparsity that its recipe's budget comes to; as it is where there is none.

    It is the smallest sparsity at which the nonzero parameters, or the multiply-adds with nonzero weights, stay within
    the budget, on the scores that the weights have now. Raises BudgetError where removing every weight is not enough.
    """
    if job.recipe.budget is None:
        return job, None
    amount = parse_budget(job.recipe.budget)
    dense, fixed, each = _prices(job, model, amount.unit)
    scores = Scores(job.layers, job.statistics(model).layers, job.method)
    limit = amount.limit(dense)
    total = sum(scores[n].total * scores[n].elements for n in scores)

    def cost(removed: int) -> int:
        kept = job.method.allocation(scores, removed / total)
        return fixed + sum(each[n][0] * int(k.sum()) * scores[n].elements // each[n][1] for n, k in kept.items())

    if fixed > limit:
        why = f"{fixed:,.0f} are in what this pattern does not prune"
        raise BudgetError(amount.text, amount.unit, limit, fixed, dense, why)
    removed = _fewest(cost, limit, total - 1)
    sparsity = removed / total
    log.info("budget %s: sparsity %.6f", amount.text, sparsity)
    promised = cost(removed)
    if promised > limit:
        raise BudgetError(amount.text, amount.unit, limit, promised, dense, "one unit of all has to stay")
    return replace(job, sparsity=sparsity), Budget(amount.text, amount.unit, dense, limit, promised)


def _prices(job: Job, model: nn.Module, unit: str) -> tuple[int, int, dict[str, tuple[int, int]]]:
    """What the dense model costs, what of it stays whatever is removed, and, as a fraction, what a layer's weight costs."""
    if unit == "params":
        found = sizes(model)
        biases = {layer.bias for layer in job.layers.values() if job.method.pattern.whole_outputs}
        fixed = sum(s.nonzeros for s in found.layers if s.name not in job.layers and s.name not in biases)
        row = {n: layer.shape[1:].numel() for n, layer in job.layers.items()}
        with_bias = {n: layer.bias is not None and layer.bias in biases for n, layer in job.layers.items()}
        return found.parameters, fixed, {n: (row[n] + with_bias[n], row[n]) for n in job.layers}
    if job.example is None:
        raise RecipeError("a budget in MACs follows a batch through the model: pass example= or data=")
    counted = macs(model, job.example)
    of_layer = {layer.name: layer for layer in counted.layers}
    fixed = counted.nonzero - sum(of_layer[n].nonzero for n in job.layers if n in of_layer)
    each = {n: (of_layer[n].dense if n in of_layer else 0, layer.parameter.numel()) for n, layer in job.layers.items()}
    return counted.dense, fixed, each


def _fewest(cost: Callable[[int], int], limit: float, most: int) -> int:
    """The fewest weights removed at which the cost, which falls with them, is within `limit`; `most` where it never is.

    False position and bisection take turns: the first is quick where the cost is nearly a line, the second never slow.
    """
    low, high = -1, most  # too dear at low, within at high
    if (dearest := cost(0)) <= limit:
        return 0
    low, above, below = 0, dearest, cost(most)
    for turn in range(200):
        if high - low <= 1:
            break
        slope = (above - below) / (high - low)
        guess = low + int((above - limit) / slope) + 1 if slope > 0 and turn % 3 < 2 else (low + high) // 2
        middle = min(max(guess, low + 1), high - 1)
        found = cost(middle)
        if found <= limit:
            high, below = middle, found
        else:
            low, above = middle, found
    return high
