"""Shared weights that stay shared: equal weights of a tensor move together, by the sum of their gradients."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import TrainingError, UnknownName

_MOST_VALUES = 4096


@dataclass
class _Entry:
    """One tensor: where its kept weights are, which value each has, and one weight of every value."""

    parameter: nn.Parameter
    kept: Tensor  #: flat positions of the weights that are not 0
    codes: Tensor  #: cluster of each of them
    first: Tensor  #: position, among the kept, of one weight of each cluster
    clusters: int

    def gather(self) -> None:
        """Every weight's gradient becomes the sum of its cluster's; that of removed weights becomes 0."""
        grad = self.parameter.grad
        if grad is None:
            return
        flat = grad.detach().reshape(-1)
        sums = torch.zeros(self.clusters, dtype=flat.dtype, device=flat.device).index_add_(0, self.codes, flat[self.kept])
        whole = torch.zeros_like(flat)
        whole[self.kept] = sums[self.codes]
        grad.copy_(whole.reshape(grad.shape))

    def tie(self) -> None:
        """Rounding may part equal weights by a bit: all take the value of the first of their cluster."""
        flat = self.parameter.detach().reshape(-1)
        values = flat[self.kept[self.first]]
        whole = torch.zeros_like(flat)
        whole[self.kept] = values[self.codes]
        self.parameter.detach().copy_(whole.reshape(self.parameter.shape))


class Tied:
    """Keeps the clusters of shared weights on one optimizer; made by `tie`. A context manager."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, names: Collection[str]):
        parameters = dict(model.named_parameters())
        if unknown := [name for name in names if name not in parameters]:
            raise UnknownName("parameter", unknown[0], parameters)
        self._entries = [_entry(name, parameters[name]) for name in names]
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def __enter__(self) -> Tied:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, *_: Any) -> None:
        for entry in self._entries:
            entry.gather()

    def _after(self, *_: Any) -> None:
        for entry in self._entries:
            entry.tie()


def tie(optimizer: Optimizer, model: nn.Module, names: Collection[str]) -> Tied:
    """Train centroids instead of weights: within each parameter named, weights that are equal now stay equal, zeros stay 0.

    Before each step of `optimizer` the gradients of a cluster are summed (Han, Mao and Dally 2016, Deep Compression, equation
    3); after it all weights of the cluster are made the same bits. For optimizers in which a weight's step depends on its own
    gradient alone (SGD, Adam and their kin).

    Raises UnknownName for a parameter that the model lacks, TrainingError for one of more than 4096 different values, which
    is not shared.
    """
    return Tied(optimizer, model, names)


def _entry(name: str, parameter: nn.Parameter) -> _Entry:
    flat = parameter.detach().reshape(-1)
    kept = flat.nonzero()[:, 0]
    values, codes = flat[kept].unique(return_inverse=True)
    if len(values) > _MOST_VALUES:
        raise TrainingError(
            f"{name!r} has {len(values)} different values, more than {_MOST_VALUES}: share its weights before training them"
        )
    first = torch.full((len(values),), len(kept), dtype=torch.int64, device=flat.device)
    first.scatter_reduce_(0, codes, torch.arange(len(kept), device=flat.device), "amin")
    return _Entry(parameter, kept, codes, first, len(values))
