"""One ranking of all layers by magnitude, whatever the criterion chooses by within a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import IntTensor

from secateur.allocation.globally import globally
from secateur.types import UnitScores


def by_magnitude(layers: Mapping[str, UnitScores], sparsity: float) -> dict[str, IntTensor]:
    """Each layer keeps as many units as it has among the largest of all layers, by the sum of their weights' magnitudes.

    How many stay is decided by the weights as they are, which units stay by the criterion: as MULTIFLOW does, within each
    modality (``groups = "modality"``). What was removed before stays removed.
    """
    return globally({n: replace(u, compute=u.magnitudes) for n, u in layers.items()}, sparsity)
