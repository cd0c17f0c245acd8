"""Random: the baseline that every other criterion has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.types import LayerStats, Need


@criterion("random", needs={Need.WEIGHT}, source="baseline", reduction="mean")
def random(layer: LayerStats) -> Tensor:
    """Uniform numbers in [0, 1) that depend on the seed, the layer's name and its shape only.

    They are drawn on the CPU, so the same seed gives the same mask on every device, and masks of rising sparsity are nested.
    """
    generator = torch.Generator().manual_seed(layer.seed)
    return torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)
