"""How coarse the steps of each output may be: what a rounding error there does to the output of the whole network.

To second order the expected squared change of the network's output is, for independent errors of the layers' outputs, the
sum over them of their squared size times the squared gradient of the network's output: a diagonal Gauss-Newton, by output and
not by weight. Rounding a row to steps of ``s`` with its errors made up for by the inputs to come leaves ``s^2 / 12`` times the
squared diagonal of the Gram matrix's factor (GPTQ), and costs ``-log2 s`` bits a weight. So at the least total error for a
number of bits all rows of all layers have the same product of importance and squared step (reverse water-filling).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from secateur.coding.integers import sorted_root
from secateur.data.batches import Batch, forward, output_tensor
from secateur.layers import Layer
from secateur.measure.modes import evaluating
from secateur.progress import track

_DRAWS = 2  # random directions of the output for each batch
_LEAST = 1e-3  # of a layer's mean importance: outputs that seem to matter less are taken to matter as much


def output_importance(
    model: nn.Module, layers: Mapping[str, Layer], batches: Iterable[Batch], *, seed: int = 0
) -> dict[str, Tensor]:
    """``[out]`` for each layer that the batches reach: mean over samples and positions of ``(u^T J)^2``.

    ``J`` is the Jacobian of the model's output in that of the layer, ``u`` a random direction in the units of the size of each
    sample's output: no labels are needed. For linear and convolution layers. The model is left as it was.

    >>> from secateur.layers import find_layers
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> model[1].weight.data = torch.tensor([[3.0, 0.0]])
    >>> output_importance(model, find_layers(model)[0], [torch.ones(4, 2)])["0.weight"][1].item()
    0.0
    """
    draw = Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    seen: dict[str, Tensor] = {}
    frozen = [la.parameter for la in layers.values() if not la.parameter.requires_grad]
    handles = [la.module.register_forward_hook(_keeping(seen, name)) for name, la in layers.items()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for batch in track(batches, "weighing outputs"):
                seen.clear()
                _add(output_tensor(forward(model, batch)), dict(seen), draw, layers, sums, counts)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for handle in handles:
            handle.remove()
    return {name: (total / counts[name]).float() for name, total in sums.items()}


def coarseness(weight: Tensor, gram: Tensor, importance: Tensor, name: str) -> Tensor:
    """Steps ``[out]`` of the rows of a weight up to one factor that all layers share."""
    root, _ = sorted_root(gram, name)
    spread = root.diagonal(dim1=1, dim2=2).square().mean(1).float()  # of a group's rounding errors, for a step of 1
    matters = importance.to(spread.device)
    matters = matters.clamp_min(float(matters.mean()) * _LEAST)
    product = matters * spread.repeat_interleave(weight.shape[0] // len(spread))
    return torch.where(product > 0, product.clamp_min(torch.finfo(torch.float32).tiny).rsqrt(), torch.inf)


def _keeping(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    return lambda _, __, output: seen.__setitem__(name, output)


def _add(
    output: Tensor,
    seen: Mapping[str, Tensor],
    draw: Generator,
    layers: Mapping[str, Layer],
    sums: dict[str, Tensor],
    counts: dict[str, int],
) -> None:
    """Add the squared gradients of one batch's output, in some directions, at the outputs that were seen."""
    names = [name for name, value in seen.items() if value.requires_grad]
    size = output.detach().flatten(1).norm(dim=1).clamp_min(1e-12).reshape(-1, *[1] * (output.dim() - 1))
    for number in range(_DRAWS):
        direction = torch.randn(output.shape, generator=draw).to(output) / size
        keep = number + 1 < _DRAWS
        found = torch.autograd.grad(output, [seen[n] for n in names], direction, retain_graph=keep, allow_unused=True)
        for name, grad in zip(names, found, strict=True):
            if grad is None:
                continue
            channel = grad.dim() - 1 if isinstance(layers[name].module, nn.Linear) else 1
            squares = grad.double().square().sum([d for d in range(grad.dim()) if d != channel])
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares
            counts[name] = counts.get(name, 0) + grad.numel() // len(squares)
