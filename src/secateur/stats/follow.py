"""What reaches one layer, what it gives, and the sum that its output goes into: on a batch of the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.data.batches import Batch, forward, token_mask
from secateur.layers import Layer
from secateur.stats.guard import ordinary
from secateur.stats.reads import Reads
from secateur.stats.watch import Call

#: Normalisations that are a factor and a shift per channel in eval mode. Subclasses may do more, such as an activation.
_AFFINE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(eq=False)
class Sight:
    """One call of a layer: its arguments, its output, and where the output went."""

    layer: str
    call: Call
    output: Tensor
    tip: Tensor | None  #: the output, or that of the BatchNorm after it, until it goes elsewhere
    norm: _BatchNorm | None = None  #: the BatchNorm that takes the output
    total: Tensor | None = None  #: the sum with another tensor of its shape that the output, or its BatchNorm's, goes into

    @property
    def axis(self) -> int:
        """The dimension of the output that holds its channels, with or without a batch dimension."""
        return self.output.dim() - self.call.module.weight.dim() + 1

    def slope(self) -> Tensor | None:
        """``[channels]``: by what a BatchNorm between the output and the sum multiplies it; None where there is none."""
        if self.norm is None:
            return None
        assert self.norm.running_var is not None
        slope = torch.rsqrt(self.norm.running_var + self.norm.eps)
        return slope if self.norm.weight is None else slope * self.norm.weight


class _Enough(Exception):
    """Ends a forward pass once everything that was asked for is seen."""


class _Follower(TorchDispatchMode):
    """Adds the sums to the sights whose tip goes into them; ends the pass when `enough` says so."""

    def __init__(self, sights: list[Sight], enough: Callable[[], bool]):
        super().__init__()
        self._sights, self._enough = sights, enough

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carries the operation out, and looks at it if it is a sum."""
        result = func(*args, **(kwargs or {}))
        if func in _SUMS and not kwargs and all(isinstance(a, Tensor) and a.shape == result.shape for a in args):
            for sight in self._sights:
                if sight.tip is not None and any(a is sight.tip for a in args):
                    sight.total, sight.tip = result.clone(), None
            if self._enough():
                raise _Enough
        return result


def follow(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batch: Batch,
    enough: Callable[[list[Sight]], bool],
    reads: Reads | None = None,
) -> list[Sight]:
    """The calls of `layers` in the order of the forward pass on `batch`, which ends as soon as `enough` is true of them.

    From a layer's output the pass is followed through a BatchNorm, and through what hands a tensor on as it is (dropout in
    eval mode, identities), to the first sum with a tensor of the same shape: the end of a residual block. The tensors of the
    sights are copies, which no operation in place changes. `reads` knows which positions are tokens where a model reads
    more. Call it in eval mode and without gradients.
    """
    sights: list[Sight] = []
    batch = ordinary(batch)
    with ExitStack() as stack:
        stack.enter_context(_hooks(model, layers, batch, sights, lambda: enough(sights), reads))
        stack.enter_context(_Follower(sights, lambda: enough(sights)))
        with suppress(_Enough):
            forward(model, batch)
    return sights


@contextmanager
def _hooks(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batch: Batch,
    sights: list[Sight],
    enough: Callable[[], bool],
    reads: Reads | None,
) -> Iterator[None]:
    mask = token_mask(batch)
    given: dict[nn.Module, Call] = {}

    def before(names: tuple[str, ...]) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
            given[module] = Call(module, args, kwargs, mask, reads, names)

        return hook

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            sights.append(Sight(name, given.pop(module), output.clone(), output))
            if enough():
                raise _Enough

        return hook

    def norm(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for sight in sights:
            if args and sight.tip is args[0] and sight.norm is None:
                sight.norm = module  # type: ignore[assignment]
                sight.tip = output if type(module) in _AFFINE else None

    with ExitStack() as stack:
        for layer in layers.values():
            names = (layer.name, *layer.aliases)
            modules = {model.get_submodule(n.rpartition(".")[0]) for n in names}
            for module in modules:  # a module shared under two names is one module
                stack.callback(module.register_forward_pre_hook(before(names), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after(layer.name)).remove)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                stack.callback(module.register_forward_hook(norm).remove)
        yield
