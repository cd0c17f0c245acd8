"""Masks under which removed weights are not lost: they wait with their values, or go on being trained, and may come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import BoolTensor, Tensor, nn
from torch.optim import Optimizer

from secateur.errors import TrainingError
from secateur.sharded import spread_like, whole
from secateur.train.hold import Held


class Shadow(Held):
    """As `Held`, with the full value of every masked parameter kept beside the model.

    The model itself always has exact zeros where weights are removed. Where `trained`, each step of the optimizer is made
    on the full values with the gradients of the masked ones (the straight-through estimator); otherwise removed weights
    stay at the value that they had. Costs a second copy of the masked weights, and two more passes over them a step where
    `trained`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        masks: Mapping[str, BoolTensor],
        model: nn.Module | None = None,
        *,
        trained: bool,
        full: Mapping[str, Tensor] | None = None,
    ):
        self._trained = trained
        self._full: dict[str, Tensor] = {}
        self._given = dict(full or {})
        super().__init__(optimizer, masks, model)

    @property
    def full(self) -> dict[str, Tensor]:
        """The values of all weights of each masked parameter, removed ones too, by name; whole where they are sharded."""
        return {name: whole(self._value(name, p)) for name, p in self._owned()}

    def value(self, name: str) -> Tensor:
        """Of one parameter what `full` says of all."""
        return self._value(name, self._parameter(name))

    def restore(self, masks: Mapping[str, BoolTensor], full: Mapping[str, Tensor]) -> None:
        """Go on from the masks and values of another `Shadow`."""
        self._given = dict(full)
        self._set(masks)

    def release(self) -> None:
        """As `Held.release`; the values of removed weights are forgotten."""
        self._trained = False
        self._full = {}
        super().release()

    def _owned(self) -> list[tuple[str, Tensor]]:
        return [(name, entry.parameter) for name, entry in zip(self._masks, self._entries, strict=True)]

    @torch.no_grad()
    def _value(self, name: str, parameter: Tensor) -> Tensor:
        if name not in self._full:
            return parameter.detach().clone()
        mask = spread_like(self._masks[name].to(parameter.device), parameter)
        return torch.where(mask, parameter.detach(), self._full[name].to(parameter.device))

    @torch.no_grad()
    def _refill(self, parameters: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            given = self._given.pop(name, None)
            self._full[name] = self._value(name, parameter) if given is None else _owned_copy(given, parameter)
            parameter.copy_(self._full[name])

    def _acts_before_steps(self) -> bool:
        return self._trained or super()._acts_before_steps()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._trained:
            return super()._before_step(optimizer, args, kwargs)
        if any(callable(a) for a in (*args[1:], *kwargs.values())):
            raise TrainingError(
                f"{type(optimizer).__name__} was given a closure, which would compute the loss with weights that are removed. "
                "Call optimizer.step() without one, or leave regrow out."
            )
        for name, parameter in self._owned():
            parameter.copy_(self._full[name])
        return None

    @torch.no_grad()
    def _after_step(self, *hook: object) -> None:
        if self._trained:
            for name, parameter in self._owned():
                self._full[name].copy_(parameter)
        super()._after_step(*hook)

    def _clear_state(self) -> None:
        if not self._trained:
            super()._clear_state()


def _owned_copy(value: Tensor, parameter: Tensor) -> Tensor:
    return spread_like(value.detach().to(parameter.device, copy=True), parameter)
