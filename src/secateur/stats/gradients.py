"""Gradients of the calibration loss, in sums over samples: first order, squared per sample, and Hessian times gradient."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from secateur.data.batches import Batch, Loss, samples_of, size_of
from secateur.errors import DataError
from secateur.layers import Layer
from secateur.stats.guard import leaves_and_spec
from secateur.stats.swap import swapped

#: Bytes of per-sample gradients held at once. More is not faster on any machine tried.
CHUNK_BYTES = 128 << 20


class Sums:
    """Float32 sums of one statistic, by layer, in the layout that the parameters are stored in."""

    def __init__(self, layers: Sequence[Layer]):
        self._layers = layers
        self.tensors = [torch.zeros_like(la.parameter, dtype=torch.float32, requires_grad=False) for la in layers]
        self.reached = [False] * len(layers)

    def add(self, values: Sequence[Tensor | None], weight: float = 1.0) -> None:
        """Add ``weight * values``; None stands for a layer that had no part in it."""
        for i, value in enumerate(values):
            if value is not None:
                self.reached[i] = True
                self.tensors[i].add_(value.detach().float(), alpha=weight)

    def add_squares(self, values: Sequence[Tensor | None]) -> None:
        """Add the squares of one sample's gradients."""
        for i, value in enumerate(values):
            if value is not None:
                self.reached[i] = True
                value = value.detach().float()
                self.tensors[i].addcmul_(value, value)

    def mean(self, samples: int) -> dict[str, Tensor]:
        """The sums over `samples` in canonical orientation, by layer. The sums themselves are given up."""
        return {la.name: la.canonical(t.div_(samples)) for la, t in zip(self._layers, self.tensors, strict=True)}


def gradients(value: Tensor, layers: Sequence[Layer]) -> list[Tensor | None]:
    """Gradient of the scalar `value` in each layer's parameter, None where it has none; no ``.grad`` is touched."""
    if not value.requires_grad:
        return [None] * len(layers)
    return list(torch.autograd.grad(value, [layer.parameter for layer in layers], allow_unused=True))


def scalar(value: Any) -> Tensor:
    """What a loss returned, which has to be one floating-point number."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        what = f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"the loss returned {what}; it must return one floating-point number, the mean over the batch")
    return value.reshape(())


def hessian_gradient(
    model: nn.Module, loss: Loss, batch: Batch, layers: Sequence[Layer], direction: Sequence[Tensor]
) -> list[Tensor | None]:
    """Hessian of the loss of `batch` times `direction`, by differentiating twice (fused attention cannot be)."""
    with sdpa_kernel(SDPBackend.MATH):
        value = scalar(loss(model, batch))
        if not value.requires_grad:
            return [None] * len(layers)
        parameters = [layer.parameter for layer in layers]
        first = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
        dots = [(g * v.to(g.dtype)).sum() for g, v in zip(first, direction, strict=True) if g is not None and g.requires_grad]
        if not dots:  # the loss is linear in every weight
            return [None if g is None else torch.zeros_like(g) for g in first]
        second = torch.autograd.grad(torch.stack(dots).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(g) if s is None and g is not None else s for g, s in zip(first, second, strict=True)]


class SquaredGradients:
    """Sums the squared gradients of single samples: vectorised where torch.func can, otherwise sample by sample.

    Both ways give each sample's own loss, of a batch of one, to the same function. Why the slow way was taken is in `note`.
    """

    def __init__(self, model: nn.Module, loss: Loss, layers: Sequence[Layer]):
        self._model, self._loss, self._layers = model, loss, layers
        self.sums = Sums(layers)
        self.note: str | None = None
        bytes_of_one = 4 * sum(layer.parameter.numel() for layer in layers)
        self._chunk = max(1, CHUNK_BYTES // max(1, bytes_of_one))

    def add(self, batch: Batch) -> None:
        """Add the samples of `batch`."""
        if self._chunk == 1 or size_of(batch) == 1 or self.note is not None:
            self._one_by_one(batch)
            return
        try:
            sums = self._vectorised(batch)
        except Exception as error:  # whatever vmap cannot do; a fault of the model itself shows again in the loop
            self.note = f"per-sample gradients were taken one sample at a time, as they cannot be vectorised: {_brief(error)}"
            self._one_by_one(batch)
            return
        self.sums.add(sums)

    def _one_by_one(self, batch: Batch) -> None:
        for sample in samples_of(batch):
            self.sums.add_squares(gradients(scalar(self._loss(self._model, sample)), self._layers))

    def _vectorised(self, batch: Batch) -> list[Tensor]:
        """Sum of squares over the samples of `batch`, nothing added yet, so that a refusal half-way costs nothing."""
        size = size_of(batch)
        leaves, spec = leaves_and_spec(batch)
        split = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size]
        parameters = [layer.parameter for layer in self._layers]

        def loss_of_one(weights: list[Tensor], *parts: Tensor) -> Tensor:
            sample = list(leaves)
            for i, part in zip(split, parts, strict=True):
                sample[i] = part.unsqueeze(0)
            with swapped(self._model, zip(parameters, weights, strict=True)):
                return scalar(self._loss(self._model, pytree.tree_unflatten(sample, spec)))

        per_sample = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, *(0 for _ in split)))
        totals: list[Tensor] = []
        for start in range(0, size, self._chunk):
            # Fused attention has no batching rule; where another operation has none, it is slower and as exact.
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                parts = (leaves[i][start : start + self._chunk] for i in split)
                found = per_sample([p.detach() for p in parameters], *parts)
                squares = [g.float().square_().sum(0) for g in found]
            totals = squares if not totals else [a.add_(b) for a, b in zip(totals, squares, strict=True)]
        return totals


def _brief(error: Exception) -> str:
    return textwrap.shorten(str(error).partition("\n")[0], 120, placeholder=" ...") or type(error).__name__
