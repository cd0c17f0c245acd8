"""BatchNorm into the convolution or linear layer before it, found by watching one real forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Watch(TorchDispatchMode):
    """Counts how many operations read each tensor that a layer put out."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[nn.Module, Tensor, Any]] = {}  # by id of the output, which is kept so that ids stay unique
        self.uses: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if id(leaf) in self.made:
                self.uses[id(leaf)] += 1
        return func(*args, **(kwargs or {}))


class Pair(NamedTuple):
    """A layer, the BatchNorm that alone reads what it puts out, and the input the layer met."""

    layer: nn.Module
    norm: nn.Module
    x: Tensor


def find_pairs(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Pair]:
    """Layers with a BatchNorm that could be folded into them, each called once.

    Runs the model once, in evaluation mode. Control flow does not matter: what is watched is the tensors themselves.
    """
    watch, calls, pairs = _Watch(), Counter[nn.Module](), []

    def made(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[module] += 1
        watch.made[id(output)] = (module, output, inputs[0] if inputs else None)

    def met(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls[norm] += 1
        if inputs and id(inputs[0]) in watch.made:
            pairs.append((id(inputs[0]), norm))

    handles = [m.register_forward_hook(made) for m in model.modules() if isinstance(m, _PRODUCERS)]
    handles += [m.register_forward_pre_hook(met) for m in model.modules() if type(m) in _NORMS]
    try:
        with torch.no_grad(), watch:
            outputs = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    shown = {id(leaf) for leaf in tree_leaves(outputs)}
    private = [(watch.made[key], norm) for key, norm in pairs if watch.uses[key] == 1 and key not in shown]
    found = [Pair(layer, norm, x) for (layer, _, x), norm in private if isinstance(x, Tensor)]
    return [p for p in found if calls[p.layer] == calls[p.norm] == 1 and _plain(p.layer) and _foldable(p.norm)]


def fold_checked(pair: Pair) -> bool:
    """Fold and compare on the input at hand; undone and False where the layer, perhaps a subclass, then computes otherwise."""
    layer: Any = pair.layer
    weight, bias = layer.weight, layer.bias
    expected = pair.norm(layer(pair.x))
    fold(layer, pair.norm)
    got = layer(pair.x)
    if got.shape == expected.shape and bool((got - expected).abs().max() <= 1e-3 * expected.abs().max()):
        return True
    layer.weight, layer.bias = weight, bias
    return False


@torch.no_grad()
def fold(layer: nn.Module, norm: nn.Module) -> None:
    """Fold ``norm(layer(x))`` in evaluation mode into the weight and bias of `layer`, in place, computed in float64.

    ``W' = W * gamma / sqrt(var + eps)``, ``b' = (b - mean) * gamma / sqrt(var + eps) + beta``.
    """
    n: Any = norm
    dense: Any = layer
    mean, var = n.running_mean.double(), n.running_var.double()
    gamma = torch.ones_like(mean) if n.weight is None else n.weight.double()
    beta = torch.zeros_like(mean) if n.bias is None else n.bias.double()
    bias = torch.zeros_like(mean) if dense.bias is None else dense.bias.double()
    weight: Tensor = dense.weight
    scale = gamma / torch.sqrt(var + n.eps)
    folded = (weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    dense.weight = nn.Parameter(folded, requires_grad=False)
    dense.bias = nn.Parameter(((bias - mean) * scale + beta).to(weight.dtype), requires_grad=False)


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> list[str]:
    """Put `new` wherever `model` holds `old`. Returns the names of those places."""
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is old]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return names


def _plain(layer: nn.Module) -> bool:
    return not (layer._forward_hooks or layer._forward_pre_hooks) and not hasattr(layer, "parametrizations")


def _foldable(norm: nn.Module) -> bool:
    return norm.running_mean is not None and not norm.training and _plain(norm)
