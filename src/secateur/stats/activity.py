"""What units do in a forward pass: the norms of their activations, and what gates on them would change of the loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.batches import Batch, Batches, Loss, default_loss, forward, size_of, token_mask
from secateur.errors import NonFiniteError
from secateur.layers import non_finite_message
from secateur.progress import track
from secateur.stats import nonfinite
from secateur.stats.gradients import scalar
from secateur.stats.guard import ordinary, untouched
from secateur.stats.reads import Reads, reads_of
from secateur.stats.watch import Call
from secateur.types import UnitNeed

_GATES = frozenset({UnitNeed.GATE_ABS, UnitNeed.GATE_SQ})
#: Normalisations whose channels are dimension 1; others have them last.
_CHANNELS_FIRST = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Part:
    """The units of one group among the channels seen at a site: channel ``indices[i]`` is of ``units[i]``, below `count`."""

    name: str
    indices: Tensor
    units: Tensor
    count: int

    def fold(self, channels: Tensor) -> Tensor:
        """``[..., channels]`` -> ``[..., units]``, summed."""
        units, chosen = self.units.to(channels.device), channels[..., self.indices.to(channels.device)]
        return channels.new_zeros(*channels.shape[:-1], self.count).index_add_(-1, units, chosen)


@dataclass(frozen=True, eq=False)
class Site:
    """Where units are seen: what a module is given, or gives with `output`."""

    module: nn.Module
    parts: tuple[Part, ...]
    output: bool = False

    def dim(self, seen: Tensor) -> int:
        """The dimension of the channels, counted from the end."""
        weight = self.module.weight
        if weight.dim() > 1:  # type: ignore[operator]
            return -1 if weight.dim() == 2 else 1 - weight.dim()  # type: ignore[operator]
        first = isinstance(self.module, _CHANNELS_FIRST) or seen.shape[-1] != len(weight)  # type: ignore[arg-type]
        return 1 - seen.dim() if first else -1


@dataclass
class _Sums:
    """Sums over samples for the units of one part."""

    squares: Tensor
    absolute: Tensor
    squared: Tensor
    called: bool = False

    @classmethod
    def zero(cls, count: int) -> _Sums:
        """Nothing seen of `count` units."""
        return cls(*torch.zeros(3, count, dtype=torch.float64).unbind())  # type: ignore[arg-type]


def activity(
    model: nn.Module,
    sites: Sequence[Site],
    needs: Collection[UnitNeed],
    batches: Batches,
    *,
    loss: Loss | None = None,
    seed: int = 0,
) -> dict[str, dict[UnitNeed, Tensor]]:
    """The statistics `needs` of the units of every part, by its name, float32 ``[units]``, in one pass over `batches`.

    Parts whose module the forward does not call are left out. ACTIVATION_NORM is the l2 norm over all samples and positions,
    padding (``attention_mask``) left out. For the gates, what is seen at a site is multiplied by a factor of 1 for each sample
    and channel, whose gradient ``g`` is the sum over positions of ``dL/da * a``; the sums over a unit's channels and over the
    calls of the module give GATE_ABS, the mean of ``|g|``, and GATE_SQ, the mean of ``g^2``, over samples. `loss` is a mean
    over the samples of a batch. Where the first dimension at a site is a multiple of the batch, so many rows in a row are
    of one sample; where it is not, every row counts as a sample.

    The model is left as it was. Raises NonFiniteError for NaN or infinite activations, gradients or losses.
    """
    gated, compute = bool(_GATES & set(needs)), loss or default_loss
    watch = _Watch(model, sites, gated, reads_of(model, batches, seed))
    samples = 0
    with untouched(model, [], seed), torch.set_grad_enabled(gated):
        for index, batch in enumerate(track(batches, "calibrate")):
            batch = ordinary(batch)
            with watch.on(batch):
                value = scalar(compute(model, batch)) if gated else forward(model, batch)
            if gated:
                if not torch.isfinite(value):
                    nonfinite.explain(model, lambda batch=batch: compute(model, batch), index)  # type: ignore[misc]
                watch.differentiate(value, size_of(batch))
            samples += size_of(batch)
    return {name: _found(name, sums, needs, samples) for name, sums in watch.sums.items() if sums.called}


def _found(name: str, sums: _Sums, needs: Collection[UnitNeed], samples: int) -> dict[UnitNeed, Tensor]:
    values = {
        UnitNeed.ACTIVATION_NORM: sums.squares.sqrt(),
        UnitNeed.GATE_ABS: sums.absolute / samples,
        UnitNeed.GATE_SQ: sums.squared / samples,
    }
    for need in needs:
        if not torch.isfinite(values[need]).all():
            raise NonFiniteError(non_finite_message(f"the statistic {need.value!r} of {name}", values[need]))
    return {need: values[need].float() for need in needs}


class _Watch:
    """Hooks at all sites during a forward pass, and what they saw."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], gated: bool, reads: Reads | None):
        self.sites, self.gated, self._reads = sites, gated, reads
        names = {id(m): n for n, m in model.named_modules()}
        self._names = {s: [f"{names[id(s.module)]}.{p}" for p, _ in s.module.named_parameters(recurse=False)] for s in sites}
        self.sums = {p.name: _Sums.zero(p.count) for s in sites for p in s.parts}
        self._gates: list[tuple[Site, Tensor]] = []  # of the pass in hand, one for each call

    @contextmanager
    def on(self, batch: Batch) -> Iterator[None]:
        """Hooks on for one forward pass of `batch`; off afterwards, whatever happens."""
        mask = token_mask(batch)
        handles = []
        try:
            for site in self.sites:
                look = functools.partial(self._look, site, mask)
                if site.output:
                    handles.append(site.module.register_forward_hook(lambda _, args, out, look=look: look(out)))
                else:
                    handles.append(site.module.register_forward_pre_hook(_on_input(look), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, site: Site, mask: Tensor | None, tensor: Tensor) -> Tensor:
        """Take in one call; what goes on is the tensor, through its gates where there are any."""
        dim = site.dim(tensor)
        call = Call(site.module, (), {}, mask, self._reads, self._names[site])
        squares = call.squares(tensor.movedim(dim, -1))
        for part in site.parts:
            self.sums[part.name].squares += part.fold(squares).cpu()
            self.sums[part.name].called = True
        if not self.gated:
            return tensor
        shape = [1] * tensor.dim()
        shape[0], shape[dim] = tensor.shape[0], tensor.shape[dim]
        self._gates.append((site, torch.ones(shape, dtype=tensor.dtype, device=tensor.device, requires_grad=True)))
        return tensor * self._gates[-1][1]

    def differentiate(self, value: Tensor, size: int) -> None:
        """Add the gradients of the loss of a batch of `size` samples by the gates that it went through."""
        gates = [gate for _, gate in self._gates]
        found = torch.autograd.grad(value, gates, allow_unused=True) if gates and value.requires_grad else [None] * len(gates)
        by_site: dict[Site, list[Tensor]] = {}
        for (site, _), gradient in zip(self._gates, found, strict=True):
            if gradient is not None:
                by_site.setdefault(site, []).append(gradient.reshape(len(gradient), -1).double().cpu() * size)
        self._gates.clear()
        for site, gradients in by_site.items():
            whole = [g.reshape(size, -1, g.shape[-1]).sum(1) for g in gradients if len(g) % size == 0]
            rows = [*([torch.stack(whole).sum(0)] if whole else []), *(g for g in gradients if len(g) % size)]
            for part in site.parts:
                folded = part.fold(torch.cat(rows))
                self.sums[part.name].absolute += folded.abs().sum(0)
                self.sums[part.name].squared += folded.square().sum(0)


def _on_input(look: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Any, Any]]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (look(args[0]), *args[1:]), kwargs
        name, first = next(iter(kwargs.items()))
        return args, {**kwargs, name: look(first)}

    return hook
