"""Erdos-Renyi-kernel: wide layers become sparser than narrow ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import IntTensor

from secateur.allocation.exact import exact_counts
from secateur.types import UnitScores


def erk(layers: Mapping[str, UnitScores], sparsity: float) -> dict[str, IntTensor]:
    """Density in proportion to ``(n_in + n_out + kernel sides) / (n_in * n_out * kernel size)``, at most 1.

    A layer that would be denser than 1 stays dense, and the others share the rest. The total is exact.
    """
    raw = {n: sum(u.shape) / max(1, u.shape.numel()) for n, u in layers.items()}
    sizes = {n: u.total * u.elements for n, u in layers.items()}
    budget = (1.0 - sparsity) * sum(sizes.values())
    dense: set[str] = set()
    while True:
        free = [n for n in layers if n not in dense]
        weight = sum(raw[n] * sizes[n] for n in free)
        scale = (budget - sum(sizes[n] for n in dense)) / weight if weight else 0.0
        over = [n for n in free if raw[n] * scale > 1.0]
        if not over:
            break
        dense.update(over)
    density = {n: 1.0 if n in dense else raw[n] * scale for n in layers}
    return exact_counts(layers, density, sparsity)
