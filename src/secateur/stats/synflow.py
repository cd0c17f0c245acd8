"""SynFlow's R and its gradient: the network of absolute weights, fed with ones. The model is read, never written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from secateur.data.batches import Batch, device_of, inputs_of, output_tensor, samples_of, to_device
from secateur.errors import LayerError, NonFiniteError
from secateur.layers import Layer
from secateur.stats.guard import check_reached

_LABELS = ("labels", "label", "targets", "target")


def synflow_gradient(model: nn.Module, example: Batch, layers: Sequence[Layer]) -> tuple[dict[str, Tensor], str | None]:
    """``dR/d|w|`` for every layer, canonical, float32, and a note where float32 was not enough.

    R is the sum of the model's outputs for one sample of ones, in eval mode, with every parameter replaced by its absolute
    value; buffers, such as BatchNorm's running statistics, stay. Integer inputs (token ids) stay as in `example`. Where R
    overflows or vanishes in float32 it is computed in float64 and all layers are scaled by one common factor, which
    changes no ranking. Raises NonFiniteError where float64 overflows too, and LayerError where nothing flows or
    a layer takes no part.
    """
    for dtype in (torch.float32, torch.float64):
        value, found = _gradient(model, example, layers, dtype)
        largest = max((float(g.abs().amax()) for g in found.values()), default=0.0)
        if largest > torch.finfo(dtype).tiny and all(bool(g.isfinite().all()) for g in found.values()):
            break
    else:
        if largest == 0.0:
            raise LayerError("SynFlow finds no flow: the network of absolute weights gives zero for an input of ones")
        raise NonFiniteError(f"SynFlow's R is {value.item()} even in float64: the network is too deep or its weights too large")
    if dtype == torch.float32:
        return found, None
    note = f"SynFlow's R is out of the range of float32 ({value.item():.3g}); computed in float64, scaled by one common factor"
    return {name: (g / largest).float() for name, g in found.items()}, note


def _gradient(
    model: nn.Module, example: Batch, layers: Sequence[Layer], dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()

    replaced = {name: cast(p).abs() if p.is_floating_point() else p for name, p in model.named_parameters()}
    replaced |= {name: cast(b) for name, b in model.named_buffers()}
    first_name = {id(p): name for name, p in model.named_parameters()}
    weights = [replaced[first_name[id(layer.parameter)]].requires_grad_() for layer in layers]
    args, kwargs = _ones(model, example, dtype)
    value = output_tensor(functional_call(model, replaced, args, kwargs)).sum()
    found = torch.autograd.grad(value, weights, allow_unused=True) if value.requires_grad else [None] * len(weights)
    check_reached([la.name for la, g in zip(layers, found, strict=True) if g is None], "SynFlow's signal")
    return value, {la.name: la.canonical(g) for la, g in zip(layers, found, strict=True) if g is not None}


def _ones(model: nn.Module, example: Batch, dtype: torch.dtype) -> tuple[tuple, dict]:
    sample = to_device(next(samples_of(example)), device_of(model))
    args, kwargs = inputs_of(sample)
    kwargs = {k: v for k, v in kwargs.items() if k not in _LABELS}

    def one(leaf: object) -> object:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return torch.ones_like(leaf, dtype=dtype)
        return leaf

    return pytree.tree_map(one, args), pytree.tree_map(one, kwargs)
