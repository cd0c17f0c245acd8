"""Dynamic programming over error curves: the layers' sparsities of least total error under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import IntTensor

from secateur.allocation.exact import exact_counts
from secateur.errors import RecipeError
from secateur.select import removed_count, spread
from secateur.types import UnitScores

_FEW = 32  # units in a group: so few have no densities between k and k + 1 of a group, as n:m has none
_EMPTY = 1e6  # of a layer that loses everything: only where nothing else keeps to the budget
_STEPS = 100  # densities to choose from where there are more


def dynamic(layers: Mapping[str, UnitScores], sparsity: float, *, bins: int = 10_000) -> dict[str, IntTensor]:
    """The densities whose relative output errors, from each layer's error curve, sum to least for the weights that may stay.

    Exact over the choices that it is given: hundredths, or for groups of few units (pattern ``"n:4"``, where each layer takes
    4, 3, 2 or 1 of 4) whole units of each group; between the points of a curve the logarithm of the error is interpolated.
    No layer is emptied unless the budget forces it. Costs are counted in `bins` of the budget, rounded up; what is left then
    goes to the layers evenly, and where groups are small it stays unused. What was removed before stays removed.

    SPDY weighs the errors by coefficients that it searches for with a run of the model for each; here each counts once.
    """
    if bins < 100:
        raise RecipeError(f"dynamic needs bins >= 100, got {bins}")
    total = sum(u.total * u.elements for u in layers.values())
    budget = total - removed_count(total, sparsity)
    unit = max(1.0, budget / bins)
    costs, errors, choices = [], [], []
    for u in layers.values():
        few = u.units <= _FEW
        steps = u.units if few else _STEPS
        left = u.left
        kept = [k / steps for k in range(steps + 1) if k * u.total <= left * steps]
        choices.append(kept)
        costs.append([math.ceil(d * u.total * u.elements / unit - 1e-9) for d in kept])
        errors.append(_interpolated(u, kept))
    picked = least_error(costs, errors, int(budget / unit + 1e-9))
    density = {n: c[i] for n, c, i in zip(layers, choices, picked, strict=True)}
    if any(u.units <= _FEW for u in layers.values()):
        return {n: spread(int(density[n] * u.total + 1e-9), u.groups) for n, u in layers.items()}
    return exact_counts(layers, density, sparsity)


def least_error(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int]:
    """One choice for each layer, its index: of all whose costs sum to at most `budget`, the one whose errors sum to least.

    Raises RecipeError where even the cheapest choices cost more.

    Example:
        >>> least_error([[0, 2], [0, 1, 2]], [[5.0, 0.0], [4.0, 1.0, 0.0]], 3)
        [1, 1]
    """
    best = np.zeros(budget + 1)
    taken = []
    for cost, error in zip(costs, errors, strict=True):
        options = np.full((len(cost), budget + 1), np.inf)
        for i, (c, e) in enumerate(zip(cost, error, strict=True)):
            if c <= budget:
                options[i, c:] = best[: budget + 1 - c] + e
        taken.append(options.argmin(0))
        best = options.min(0)
    if not np.isfinite(best[budget]):
        raise RecipeError(f"even the sparsest choice of every layer costs more than the budget of {budget}: lower the sparsity")
    picked = []
    for cost, choice in zip(reversed(costs), reversed(taken), strict=True):
        picked.append(int(choice[budget]))
        budget -= cost[picked[-1]]
    return picked[::-1]


def _interpolated(layer: UnitScores, kept: Sequence[float]) -> list[float]:
    """The error at every density, by the logarithm's straight lines between the curve's points; 0 at density 1."""
    if layer.curve is None:
        raise RecipeError(
            f"allocation 'dynamic' needs the error curve of {layer.name!r}: prune with data=, calibration batches"
        )
    points = sorted((1.0 - s, max(e, 1e-9)) for s, e in layer.curve.items())
    xs, ys = zip(*[(0.0, 1.0), *points], strict=True)
    found = np.exp(np.interp(kept, xs, np.log(ys)))
    found[0] = _EMPTY
    return [0.0 if d == 1.0 else float(e) for d, e in zip(kept, found, strict=True)]
