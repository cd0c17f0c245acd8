"""The solver that repairs nothing: the best-scored units stay as they are."""

from __future__ import annotations

import torch
from torch import BoolTensor, IntTensor, Tensor

from secateur.select import top
from secateur.types import LayerStats, Pattern


def keep(weight: Tensor, scores: Tensor, keep: IntTensor, pattern: Pattern, stats: LayerStats) -> tuple[BoolTensor, Tensor]:
    """Mask of the ``keep[g]`` best units of each group, and the weight with the others zeroed."""
    mask = pattern.unfold(top(scores, keep), weight.shape)
    return mask, torch.where(mask, weight, 0)
