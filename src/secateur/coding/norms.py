"""BatchNorms put into the layers before them without changing the network's shape: all that is left of them is a shift."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.batches import Batch, device_of, inputs_of, to_device
from secateur.measure.modes import evaluating
from secateur.runtime.fold import find_pairs, is_foldable


@torch.no_grad()
def fold_norms(model: nn.Module, example: Batch) -> list[tuple[nn.Module, nn.Module]]:
    """Scale each weight by its BatchNorm and leave of that the shift: weight 1, mean 0, variance 1 - eps, in place.

    The network computes the same function and its state dict has the same names and shapes; constants take no bytes when
    packed, and weights lie in the units of what follows, which is where rounding errors count. Only norms that alone read
    what one linear or convolution layer puts out. Returns those layers with their norms.
    """
    args, kwargs = inputs_of(to_device(example, device_of(model)))
    with evaluating(model):
        pairs = find_pairs(model, args, kwargs, is_foldable)
    # a norm keeps its shift, and could not keep those of two layers
    served = Counter(pair.follower for pair in pairs)
    alone = [(pair.layer, pair.follower) for pair in pairs if served[pair.follower] == 1]
    for layer, norm in alone:
        fold_norm(layer, norm)
    return alone


@torch.no_grad()
def fold_norm(layer: Any, norm: Any) -> Tensor | None:
    """Fold one norm. Returns what the outputs of the layer's weight were multiplied by, None where it cannot be folded."""
    scale = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale, shift = scale * norm.weight.double(), shift * norm.weight.double() + norm.bias.double()
    if layer.bias is not None:
        shift = shift + layer.bias.double() * scale
        layer.bias.zero_()
    elif not norm.affine:
        return None  # nowhere to put the shift
    layer.weight.copy_(layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    if norm.affine:
        norm.weight.fill_(1.0)
        norm.bias.copy_(shift)
    else:
        layer.bias.copy_(shift)
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0 - norm.eps)
    return scale
