"""Network Slimming: an L1 penalty on the scales of BatchNorm, which drives those of dispensable channels to zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.errors import TrainingError


def slimming_penalty(model: nn.Module, strength: float = 1e-4) -> Tensor:
    """``strength * sum |gamma|`` over all BatchNorm scales of `model`, to be added to the loss.

    Liu et al. 2017, Learning Efficient Convolutional Networks through Network Slimming, equation 1. Use it with SGD, as the
    paper does: AdamW rescales the penalty's gradient weight by weight. Then cut with ``criterion="bn_scale",
    allocation="global"``, and fine-tune without it. `finetune` and recipes have it as `slimming`.

    Raises TrainingError where the model has no BatchNorm scale that requires a gradient.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    >>> float(slimming_penalty(model, strength=0.5))
    2.0
    """
    scales = [
        m.weight
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None and m.weight.requires_grad
    ]
    if not scales:
        raise TrainingError("slimming trains the scales of BatchNorm, and this model has none that requires a gradient")
    return strength * torch.stack([s.abs().sum() for s in scales]).sum()
