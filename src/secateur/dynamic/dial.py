"""From a budget to the setting that meets it, by a table measured on calibration data."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from secateur.errors import BudgetError
from secateur.progress import advance


class Dial(nn.Module):
    """Settings from the cheapest to the dearest, and the mean share of the dense multiply-adds that each cost."""

    settings: Tensor  #: ``[points]``, growing
    costs: Tensor  #: ``[points]``, never falling

    def __init__(self, points: int):
        super().__init__()
        self.register_buffer("settings", torch.zeros(points, dtype=torch.float64))
        self.register_buffer("costs", torch.zeros(points, dtype=torch.float64))

    def measure(self, cheapest: float, dearest: float, cost: Callable[[float], float]) -> None:
        """Fill the table with ``cost(setting)``: at both ends, then again and again between the two that cost most unlike.

        Where a dearer setting cost less, the larger figure counts.
        """
        points = len(self.settings)
        found = {setting: cost(setting) for setting in (cheapest, dearest)}
        while len(found) < points:
            advance("costs", len(found), points)
            known = sorted(found)
            _, low, high = max((abs(found[b] - found[a]), a, b) for a, b in pairwise(known))
            middle = (low + high) / 2
            if middle in (low, high):  # the cost jumps here, and floats have nothing in between
                break
            found[middle] = cost(middle)
        advance("costs", points, points)
        known = sorted(found)
        known += known[-1:] * (points - len(known))
        self.settings.copy_(torch.tensor(known, dtype=torch.float64))
        self.costs.copy_(torch.tensor([found[s] for s in known], dtype=torch.float64).cummax(0).values)

    def setting(self, budget: float) -> float:
        """The dearest setting that cost at most `budget`. Raises BudgetError where the cheapest costs more."""
        affordable = (self.costs <= budget + 1e-9).nonzero()
        if not len(affordable):
            least = 100 * float(self.costs[0])
            raise BudgetError(f"{budget:.1%}", "% of the dense multiply-adds", 100 * budget, least, 100.0)
        return float(self.settings[affordable[-1]])

    def between(self, budgets: Tensor) -> Tensor:
        """Settings ``[n]`` for many budgets ``[n]``, linearly between those that were measured; the ends for what is beyond."""
        right = torch.searchsorted(self.costs, budgets.double().contiguous()).clamp(1, len(self.costs) - 1)
        low, high = self.costs[right - 1], self.costs[right]
        share = ((budgets - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        return self.settings[right - 1] + share * (self.settings[right] - self.settings[right - 1])
