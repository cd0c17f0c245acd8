"""YOPO: attention heads by whether they look at the image."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import unit_criterion
from secateur.errors import RecipeError
from secateur.types import UnitNeed, UnitStats


@unit_criterion(
    "yopo",
    on="outputs",
    needs={UnitNeed.VISUAL_RATIO},
    comparable=True,
    source="Zhang et al. 2024, Treat Visual Tokens as Text? (YOPO), pruning of inactive visual heads",
)
def yopo(units: UnitStats, *, threshold: float = 0.1) -> Tensor:
    """The share of samples in which the head's attention to visual positions is more than `threshold` of that to all others.

    The paper keeps a head that is above the threshold in more than 40 of 100 samples: those of a score above 0.4. Here the
    sparsity says how many go. Among heads of one share the mean of ``r / (1 + r)`` decides, scaled to less than one sample.
    """
    if not threshold > 0:
        raise RecipeError(f"yopo needs threshold > 0, got {threshold}")
    ratio = units.need(UnitNeed.VISUAL_RATIO)
    share = (ratio > threshold).float().mean(1)
    return share + (ratio / (1 + ratio)).mean(1) / (1 + ratio.shape[1])
