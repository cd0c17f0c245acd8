"""How many bits each layer gets: the choice with the least loss that fits a budget of bytes, by dynamic programming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateur.errors import RecipeError

_UNITS = 20_000  # steps into which the budget is divided; costs are rounded up, so the budget is never exceeded


def choose(options: Mapping[str, Sequence[tuple[int, float]]], budget: int) -> dict[str, int]:
    """For each layer the index of one of its options ``(bytes, loss)``: least sum of losses within `budget` bytes.

    Exact up to the rounding of costs to a 20,000th of the budget. The knapsack with one choice from each class (Kellerer,
    Pferschy and Pisinger 2004, chapter 11), as SPDY uses it for sparsity (Frantar and Alistarh 2022).

    Raises RecipeError where even the cheapest options do not fit; it says what they take.

    >>> choose({"a": [(10, 1.0), (20, 0.1)], "b": [(10, 0.3), (20, 0.2)]}, 30)
    {'a': 1, 'b': 0}
    """
    least = sum(min(cost for cost, _ in layer) for layer in options.values())
    if least > budget:
        raise RecipeError(f"{budget} bytes are too few: the fewest that the given bits need are {least}")
    unit = max(1, -(-budget // _UNITS))
    size = budget // unit + len(options) + 1  # rounding up costs each layer less than one unit
    limit = size if unit > 1 else budget
    best = np.zeros(limit + 1)
    picks = []
    for layer in options.values():
        totals = np.full((len(layer), limit + 1), np.inf)
        for row, (cost, loss) in zip(totals, layer, strict=True):
            units = -(-cost // unit)
            if units <= limit:
                row[units:] = best[: limit + 1 - units] + loss
        picks.append(totals.argmin(0))
        best = totals.min(0)
    return _traced(options, picks, unit, limit, budget)


def _traced(
    options: Mapping[str, Sequence[tuple[int, float]]], picks: list[np.ndarray], unit: int, limit: int, budget: int
) -> dict[str, int]:
    """Walk back from the largest number of units whose true cost fits the budget."""
    for at in range(limit, -1, -1):
        chosen, left, total = {}, at, 0
        for (name, layer), pick in zip(reversed(list(options.items())), reversed(picks), strict=True):
            index = int(pick[left])
            units = -(-layer[index][0] // unit)
            if units > left:
                break
            chosen[name], left, total = index, left - units, total + layer[index][0]
        if len(chosen) == len(options) and total <= budget:
            return {name: chosen[name] for name in options}
    return {name: min(range(len(layer)), key=lambda i: layer[i][0]) for name, layer in options.items()}
