"""What can go into the layer before it, BatchNorms and activations, found by watching one real forward pass."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "relu6": F.relu6}
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
    """A layer, the module that alone reads what it puts out, and the input the layer met."""

    layer: nn.Module
    follower: nn.Module
    x: Tensor


def find_pairs(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], follows: Callable[[nn.Module], bool]
) -> list[Pair]:
    """Linear and convolution layers, called once, with a follower for which `follows` is true and which serves nothing else.

    Runs the model once, in evaluation mode. Control flow does not matter: what is watched is the tensors themselves. A
    follower that works in place may hand the tensor on: whoever reads it afterwards reads the follower's result.
    """
    watch, calls, pairs = _Watch(), Counter[nn.Module](), []
    in_place: dict[int, int] = {}  # reads of a tensor up to the end of its follower

    def made(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[module] += 1
        watch.made[id(output)] = (module, output, inputs[0] if inputs else None)

    def met(follower: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[follower] += 1
        if not inputs or id(inputs[0]) not in watch.made:
            return
        pairs.append((id(inputs[0]), follower))
        if output is inputs[0]:
            in_place[id(output)] = watch.uses[id(output)]

    handles = [m.register_forward_hook(made) for m in model.modules() if isinstance(m, _PRODUCERS)]
    handles += [m.register_forward_hook(met) for m in model.modules() if follows(m)]
    try:
        with torch.no_grad(), watch:
            outputs = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    shown = {id(leaf) for leaf in tree_leaves(outputs)}
    reads = {key: in_place.get(key, watch.uses[key] + (key in shown)) for key, _ in pairs}
    found = [Pair(watch.made[key][0], follower, watch.made[key][2]) for key, follower in pairs if reads[key] == 1]
    found = [p for p in found if calls[p.layer] == 1 and isinstance(p.x, Tensor) and is_plain(p.layer)]
    served = Counter(p.follower for p in found)
    return [p for p in found if served[p.follower] == calls[p.follower]]


def fold_checked(pair: Pair) -> bool:
    """Fold and compare on the input at hand; undone and False where the layer, perhaps a subclass, then computes otherwise."""
    layer: Any = pair.layer
    weight, bias = layer.weight, layer.bias
    expected = pair.follower(layer(pair.x))
    fold(layer, pair.follower)
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


def is_plain(module: nn.Module) -> bool:
    """Whether nothing hangs on the module that a replacement would lose."""
    return not (module._forward_hooks or module._forward_pre_hooks) and not hasattr(module, "parametrizations")


def is_foldable(module: nn.Module) -> bool:
    """Whether the module is a BatchNorm in evaluation mode with statistics of its own."""
    return type(module) in _NORMS and module.running_mean is not None and not module.training and is_plain(module)


def activation_of(module: nn.Module) -> str | None:
    """Which fused activation the module computes, told by its name and by trying it; None for any other module."""
    if not re.search("relu|gelu|silu|swish", type(module).__name__, re.IGNORECASE) or not is_plain(module):
        return None
    if any(True for _ in module.children()) or any(True for _ in module.parameters()):
        return None
    probe = torch.linspace(-12, 12, 193)
    got = module(probe.clone())
    same = (name for name, apply in _ACTIVATIONS.items() if torch.allclose(got, apply(probe), rtol=1e-5, atol=1e-6))
    return next(same, None)
