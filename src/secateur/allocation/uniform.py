"""The same sparsity in every layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import IntTensor

from secateur.select import removed_count, spread
from secateur.types import UnitScores


def uniform(layers: Mapping[str, UnitScores], sparsity: float) -> dict[str, IntTensor]:
    """The same fraction from every layer, and as evenly as whole numbers allow from every group of a layer."""
    return {n: spread(u.total - removed_count(u.total, sparsity), u.groups) for n, u in layers.items()}
