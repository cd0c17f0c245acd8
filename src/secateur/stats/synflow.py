"""SynFlow's R and its gradient: the network of absolute weights, fed with ones. The model is read, never written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.data.batches import Batch, device_of, inputs_of, output_tensor, samples_of, to_device
from secateur.errors import NonFiniteError
from secateur.layers import Layer
from secateur.stats.guard import check_reached
from secateur.stats.swap import swapped


def synflow_gradient(model: nn.Module, example: Batch, layers: Sequence[Layer]) -> tuple[dict[str, Tensor], str | None]:
    """``dR/d|w|`` for every layer, canonical, float32, and a note where float32 was not enough.

    R is the sum of the model's outputs for one sample of ones, in eval mode, with every parameter replaced by its absolute
    value; buffers, such as BatchNorm's running statistics, stay. Integer inputs (token ids, labels) stay as in `example`.
    Where float32 overflows, or vanishes in some layer, R is computed in float64 and all layers are scaled by one common
    factor, which changes no ranking. Raises NonFiniteError where float64 overflows too, and LayerError naming the layers
    that the signal does not come through: scored zero throughout, they would go whole.
    """
    for dtype in (torch.float32, torch.float64):
        value, found = _gradient(model, example, layers, dtype)
        peaks = {name: float(g.abs().amax()) for name, g in found.items()}
        finite = all(bool(g.isfinite().all()) for g in found.values())
        dead = [name for name, peak in peaks.items() if peak <= torch.finfo(dtype).tiny]
        if finite and not dead:
            break
    if not finite:
        raise NonFiniteError(f"SynFlow's R is {value.item()} even in float64: the network is too deep or its weights too large")
    check_reached(dead, "SynFlow's signal saturates or dies, as ReLU6 can make it do, and ranks no weight in")
    if dtype == torch.float32:
        return found, None
    note = f"SynFlow's R is out of the range of float32 ({value.item():.3g}); computed in float64, scaled by one common factor"
    return {name: (g / max(peaks.values())).float() for name, g in found.items()}, note


def _gradient(
    model: nn.Module, example: Batch, layers: Sequence[Layer], dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()

    replaced: dict[Tensor, Tensor] = {p: cast(p).abs() if p.is_floating_point() else p for p in model.parameters()}
    replaced |= {b: cast(b) for b in model.buffers()}
    weights = [replaced[layer.parameter].requires_grad_() for layer in layers]
    args, kwargs = _ones(model, example, dtype)
    with swapped(model, replaced.items()):
        value = output_tensor(model(*args, **kwargs)).sum()
    found = torch.autograd.grad(value, weights, allow_unused=True) if value.requires_grad else [None] * len(weights)
    check_reached([la.name for la, g in zip(layers, found, strict=True) if g is None], "SynFlow's signal does not reach")
    return value, {la.name: la.canonical(g) for la, g in zip(layers, found, strict=True) if g is not None}


def _ones(model: nn.Module, example: Batch, dtype: torch.dtype) -> tuple[tuple, dict]:
    sample = to_device(next(samples_of(example)), device_of(model))
    args, kwargs = inputs_of(sample)

    def one(leaf: object) -> object:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return torch.ones_like(leaf, dtype=dtype)
        return leaf

    return pytree.tree_map(one, args), pytree.tree_map(one, kwargs)
