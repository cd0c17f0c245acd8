"""What each input cost: multiply-adds of the gated parts, as a share of what the dense model computes there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateur.errors import ModelError


@dataclass
class Costs:
    """One entry for each input, in the order in which they came; a call of the model with a batch of n adds n.

    Counted are the multiply-adds of the gated parts, and those of the deciding itself where there are any.
    """

    computed: Tensor  #: float64 ``[inputs]``: multiply-adds that were computed
    dense: Tensor  #: float64 ``[inputs]``: multiply-adds of the same parts without gates

    @property
    def shares(self) -> Tensor:
        """``[inputs]``: computed of dense."""
        return self.computed / self.dense

    @property
    def mean(self) -> float:
        """Share of all inputs together: multiply-adds computed, of all dense ones."""
        return float(self.computed.sum() / self.dense.sum())

    def quantiles(self, *at: float) -> tuple[float, ...]:
        """Quantiles of the inputs' shares; by default the least, the quartiles and the largest."""
        points = torch.tensor(at or (0.0, 0.25, 0.5, 0.75, 1.0), dtype=torch.float64)
        return tuple(torch.quantile(self.shares, points).tolist())

    def __len__(self) -> int:
        return len(self.computed)

    def __str__(self) -> str:
        if not len(self):
            return "no inputs yet"
        low, _, middle, _, high = self.quantiles()
        return f"{len(self)} inputs: {self.mean:.1%} computed on average, from {low:.1%} to {high:.1%}, median {middle:.1%}"


class Meter:
    """Adds up what the gates say they spent, input by input. `Dynamic.recording` hands it out."""

    def __init__(self) -> None:
        empty = torch.zeros(0, dtype=torch.float64)
        self.costs = Costs(empty, empty)
        self._inputs = 0

    def begin(self, args: Any, kwargs: Any) -> None:
        """A call of the model starts: its batch is the first dimension of its first tensor."""
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
        if not tensors:
            raise ModelError("the model was called without a tensor: nobody knows how many inputs that is")
        self._inputs = len(tensors[0])
        self._computed = torch.zeros(self._inputs, dtype=torch.float64)
        self._dense = torch.zeros(self._inputs, dtype=torch.float64)

    def add(self, computed: Tensor, dense: Tensor) -> None:
        """Multiply-adds of one gate, ``[batch]`` each; a batch of windows or tokens of the inputs is summed over them."""
        if not self._inputs or len(computed) % self._inputs:
            raise ModelError(f"a gate computed {len(computed)} inputs in a call of the model with {self._inputs}")
        self._computed += computed.detach().to("cpu", torch.float64).reshape(self._inputs, -1).sum(1)
        self._dense += dense.detach().to("cpu", torch.float64).reshape(self._inputs, -1).sum(1)

    def end(self) -> None:
        """The call is over; one in which no gate was reached is no entry."""
        if bool((self._dense > 0).all()):
            self.costs.computed = torch.cat([self.costs.computed, self._computed])
            self.costs.dense = torch.cat([self.costs.dense, self._dense])
        self._inputs = 0
