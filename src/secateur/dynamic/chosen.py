"""Gates that compute what somebody else chose: outputs of one linear layer, and the inputs of the next that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.dynamic.kernels import by_kernel, turn
from secateur.dynamic.linear import LinearGate
from secateur.errors import ModelError
from secateur.runtime import native


@dataclass
class Choice:
    """What was chosen for the call at hand; the gates of one attention or feed-forward part share one."""

    units: int  #: neurons or heads
    size: int = 1  #: features of a unit: 1 of a neuron, the head dimension of a head
    chosen: Tensor | None = None  #: int64 ``[..., k]``, numbers of units for each position; None: all of them

    @property
    def share(self) -> float:
        """Share of the units that is chosen."""
        return 1.0 if self.chosen is None else self.chosen.shape[-1] / self.units

    def mask(self, x: Tensor) -> Tensor:
        """Bool ``[..., units * size]`` for activations ``x [..., features]`` of the same positions."""
        assert self.chosen is not None
        if self.chosen.shape[:-1].numel() != x.shape[:-1].numel():
            raise ModelError(
                f"positions were chosen for {list(self.chosen.shape[:-1])} and computed for {list(x.shape[:-1])}: the model "
                "does not call its parts block by block on the same positions"
            )
        mask = torch.zeros(*self.chosen.shape[:-1], self.units, dtype=torch.bool, device=x.device)
        mask.scatter_(-1, self.chosen.to(x.device), True)
        return mask.reshape(*x.shape[:-1], self.units, 1).expand(*x.shape[:-1], self.units, self.size).flatten(-2)

    def rows(self) -> Tensor:
        """Int32: numbers of the features chosen for the one position at hand."""
        assert self.chosen is not None
        units = self.chosen.reshape(-1, 1)
        if self.size > 1:
            units = units * self.size + torch.arange(self.size)
        return units.flatten().int()


class _Following(LinearGate):
    """What the two gates share: the choice that they follow."""

    def __init__(self, linear: nn.Module, choice: Choice, *, swap: bool = False):
        super().__init__(linear, swap=swap)
        self.choice = choice

    def set_budget(self, budget: float) -> None:
        """Nothing: how much is computed is up to the gate that chooses."""

    def _record(self, x: Tensor) -> None:
        if self.meter is not None:
            batch = len(x) if x.dim() > 1 else 1
            dense = torch.full((batch,), float(self.macs * (x.shape[:-1].numel() // batch)), dtype=torch.float64)
            self.spend(dense * self.choice.share, dense)


class ChosenOutputs(_Following):
    """``linear(x)``, with the outputs that were not chosen 0 instead of computed."""

    def __init__(self, linear: nn.Module, choice: Choice, *, swap: bool = False):
        super().__init__(linear, choice, swap=swap)
        if swap:
            turn(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        self._record(x)
        if self.choice.chosen is None:
            return self.linear(x)
        by_output = self.by_output
        if by_kernel(x, by_output):
            rows = self.choice.rows()
            y = torch.zeros(*x.shape[:-1], by_output.shape[0])
            y.view(-1)[rows] = native.gather(x, by_output, rows, self.bias)
            return y
        y = self.linear(x)
        return y.masked_fill(~self.choice.mask(y), 0)


class ChosenInputs(_Following):
    """``linear(x)``, reading only inputs that were chosen; the others count as 0, whatever they are."""

    def __init__(self, linear: nn.Module, choice: Choice, *, swap: bool = False):
        super().__init__(linear, choice, swap=swap)
        if not swap:
            turn(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        self._record(x)
        if self.choice.chosen is None:
            return self.linear(x)
        by_input = self.by_input
        if by_kernel(x, by_input):
            rows = self.choice.rows()
            return native.combine(by_input, rows, x.view(-1)[rows], self.bias).view(*x.shape[:-1], -1)
        return self.linear(x.masked_fill(~self.choice.mask(x), 0))
