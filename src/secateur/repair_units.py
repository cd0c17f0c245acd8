"""Repair after a cut that needs no training: layers that lost inputs make up for them with those that they kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.data.batches import Batches
from secateur.layers import CONVOLUTIONS, Layer, find_layers
from secateur.stats.guard import listed
from secateur.stats.moments import input_moments
from secateur.types import Plan

#: Of the mean diagonal of the matrix that is inverted: keeps weights near where they were if inputs are alike or always zero.
DAMP = 1e-4


@dataclass(frozen=True)
class Refit:
    """New values of parameters of the cut model, by name, and what the report shall say."""

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]


def refit(model: nn.Module, plan: Plan, batches: Batches, *, bias_only: bool = False, seed: int = 0) -> Refit:
    """The weights with which `model`, cut by `plan`, comes nearest to its layers' outputs of before the cut.

    For every linear layer and convolution that loses inputs R and keeps K, over all samples and positions of the batches
    and with the inputs of the original model: ``W'_K = W_K + W_R C_RK C_KK^-1``, the least-squares solution (He, Zhang and Sun,
    Channel pruning for accelerating very deep neural networks, 2017, equation 2 for given channels), damped. C is the
    covariance of the inputs where the layer has a bias, which takes the means, and their Gram matrix where it has none. With
    `bias_only` weights stay, and the bias gets what the removed inputs gave on average. The model is not touched.

    Layers whose inputs cannot be read (recurrent ones, transposed convolutions) and, with `bias_only`, layers without a bias
    stay as they are; a note names them. Raises what reading the batches raises.

        repaired = refit(model, plan, Batches(data))
        repaired.tensors["fc2.weight"]          # [kept outputs, kept inputs]
    """
    lines = {(c.tensor, c.dim): torch.tensor(c.kept) for c in plan.cuts}
    layers, _ = find_layers(model)
    consumers = {n: layer for n, layer in layers.items() if (n, _dim(layer, 1)) in lines}
    fit = {n: layer for n, layer in consumers.items() if _readable(layer) and not (bias_only and layer.bias is None)}
    tensors: dict[str, Tensor] = {}
    for found in input_moments(model, fit, batches, seed=seed):
        for name, moments in found.items():
            layer = fit[name]
            weight = layer.canonical(layer.parameter.detach())
            rows = lines.get((name, _dim(layer, 0)), torch.arange(len(weight)))
            keep = torch.zeros(weight.shape[1], dtype=torch.bool)
            keep[lines[name, _dim(layer, 1)]] = True
            new, shift = _solve(weight, moments, keep, centred=layer.bias is not None, bias_only=bias_only)
            if not bias_only:
                tensors[name] = layer.stored(new[rows]).to(layer.parameter.dtype)
            if layer.bias is not None:
                bias = model.get_parameter(layer.bias).detach()
                tensors[layer.bias] = (bias + shift)[rows].to(bias.dtype)
    left = [n for n in consumers if n not in fit]
    notes = [f"these layers lost inputs and were not repaired, as they have no bias or show no inputs: {listed(left)}"]
    return Refit(tensors, tuple(notes if left else ()))


def _solve(weight: Tensor, moments: Tensor, keep: Tensor, *, centred: bool, bias_only: bool) -> tuple[Tensor, Tensor]:
    """``[out, kept, *kernel]`` and what the bias gets, ``[out]``, both float64.

    `weight` is canonical, `moments` ``[groups, d + 1, d + 1]``, and `keep` says of each input channel whether it stays.
    """
    groups, kernel = len(moments), weight.shape[2:]
    keep = keep.to(weight.device).repeat_interleave(kernel.numel())
    w = weight.double().reshape(groups, len(weight) // groups, -1)
    mean = moments[:, :-1, -1:] / moments[:, -1:, -1:]
    second = moments[:, :-1, :-1] / moments[:, -1:, -1:]
    if centred:
        second = second - mean @ mean.transpose(1, 2)
    kept, gone = w[:, :, keep], w[:, :, ~keep]
    if not bias_only:
        within = second[:, keep][:, :, keep]
        level = within.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
        within.diagonal(dim1=1, dim2=2).add_(DAMP * level[:, None])
        across = second[:, keep][:, :, ~keep]
        kept = kept + gone @ torch.linalg.solve(within, across).transpose(1, 2)
    shift = (w @ mean - kept @ mean[:, keep]).reshape(-1)
    return kept.reshape(len(weight), -1, *kernel), shift


def _dim(layer: Layer, canonical: int) -> int:
    """The stored dimension of a canonical one."""
    return 1 - canonical if layer.swap else canonical


def _readable(layer: Layer) -> bool:
    linear = isinstance(layer.module, (nn.Linear, *CONVOLUTIONS)) or type(layer.module).__name__ == "Conv1D"
    return linear and layer.name.endswith("weight")
