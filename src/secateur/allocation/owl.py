"""OWL: layers with more outliers among their scores keep more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import IntTensor

from secateur.allocation.exact import exact_counts
from secateur.errors import RecipeError
from secateur.select import removed_count
from secateur.types import UnitScores


def owl(
    layers: Mapping[str, UnitScores], sparsity: float, *, spread: float = 0.08, outlier: float = 5.0
) -> dict[str, IntTensor]:
    """Densities differ by at most ``2 spread``, in proportion to the share of scores above `outlier` times their layer's mean.

    Made for the scores of ``wanda``. The shares are stretched to ``[0, 2 spread]`` and shifted until the total is exact; the
    paper shifts their plain mean to the density, which is exact where all layers are of one size, and counts the outliers
    of a transformer block together where we count those of each weight. It can do worse than ``uniform``: compare.
    """
    if not 0 <= spread <= 0.5 or outlier <= 0:
        raise RecipeError(f"owl needs spread in [0, 0.5] and outlier > 0, got spread={spread}, outlier={outlier}")
    share = {n: _outliers(u.scores, outlier) for n, u in layers.items()}
    low, high = min(share.values()), max(share.values())
    stretched = {n: 2 * spread * (s - low) / (high - low) if high > low else 0.0 for n, s in share.items()}
    sizes = {n: u.total * u.elements for n, u in layers.items()}
    total = sum(sizes.values())
    budget = total - removed_count(total, sparsity)
    most = {n: u.left / max(1, u.total) for n, u in layers.items()}

    def shifted(by: float) -> dict[str, float]:
        """The densities, held between nothing and all that is left of a layer."""
        return {n: min(most[n], max(0.0, d + by)) for n, d in stretched.items()}

    below, above = -1.0 - 2 * spread, 1.0
    for _ in range(60):  # the shift by bisection
        middle = (below + above) / 2
        if sum(d * sizes[n] for n, d in shifted(middle).items()) > budget:
            above = middle
        else:
            below = middle
    return exact_counts(layers, shifted(below), sparsity)


def _outliers(scores: torch.Tensor, outlier: float) -> float:
    """Share of the units that are left whose score is above `outlier` times the mean of those."""
    left = scores[~torch.isneginf(scores)].abs()
    return float((left > outlier * left.mean(dtype=torch.float64)).double().mean()) if left.numel() else 0.0
