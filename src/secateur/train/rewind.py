"""Rewinding: the weights that a pruned network keeps, as they were early in training (the lottery ticket hypothesis)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import BoolTensor, Tensor, nn

from secateur.errors import TrainingError
from secateur.types import MaskSet


class Ticket:
    """A model's parameters and buffers at one moment: at initialisation, or some hundred steps into the training.

    Train on, prune, and ``rewind``: the kept weights go back to that moment and the rest is zero. Trained again with the masks
    held, such a network matches the dense one down to high sparsities (Frankle and Carbin 2019); in large networks only from a
    moment after the start, 0.1 to 7% of the training (Frankle et al. 2020, Linear Mode Connectivity). Make a new
    optimizer, or clear its state, after a rewind.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> ticket = Ticket(model)
        >>> masks = MaskSet({"weight": torch.eye(4) > 0})
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1.0)  # stands for the training
        >>> ticket.rewind(model, masks)
        >>> int(model.weight.count_nonzero())
        4
    """

    def __init__(self, model: nn.Module):
        self._state: dict[str, Any] = {name: _copied(value) for name, value in model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """The tensors of that moment, by name; save them with `secateur.train.checkpoint` or safetensors."""
        return dict(self._state)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Ticket:
        """A ticket of saved tensors."""
        made = cls(nn.Identity())
        made._state = {name: _copied(value) for name, value in state.items()}
        return made

    @torch.no_grad()
    def rewind(self, model: nn.Module, masks: Mapping[str, BoolTensor]) -> None:
        """Put `model` back to the moment, and zero what `masks` remove. Raises TrainingError where it is another model."""
        now = model.state_dict()
        differing = [n for n in self._state.keys() | now.keys() if _shape(self._state.get(n)) != _shape(now.get(n))]
        if differing:
            raise TrainingError(f"this ticket is of another model: {', '.join(sorted(differing)[:5])} differ in name or shape")
        model.load_state_dict(self._state)
        MaskSet(masks).apply(model)


def _copied(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value)
