"""The registry of criteria and the decorator that files them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

from torch import Tensor

from secateur.registry import Registry
from secateur.types import Need

#: ``criterion(layer: LayerStats, *, options) -> Tensor``: float32 saliency in the weight's canonical shape, higher = keep.
Criterion = Callable[..., Tensor]
F = TypeVar("F", bound=Criterion)

CRITERIA: Registry[Criterion] = Registry("criterion")


def criterion(name: str, *, needs: Collection[Need], source: str, reduction: str = "sum") -> Callable[[F], F]:
    """File a criterion under `name`. This is all that a new one takes to appear in recipes, the command line and the tests.

    `needs` are the statistics that it reads from `LayerStats`; `source` is the paper, year and equation. `reduction` names
    how a pattern makes a unit's score of its elements' unless the recipe says otherwise: ``sum``, ``mean``, ``l2``, ``max`` or
    ``abs_sum``. The registry entry's facts hold `needs` and `reduction`.

        @criterion("squared", needs={Need.WEIGHT}, source="an example")
        def squared(layer: LayerStats) -> Tensor:
            '''The square of the weight.'''
            return layer.weight.square()
    """
    wanted = frozenset(needs) | {Need.WEIGHT}
    register = CRITERIA.register(name, source=source, needs=wanted, reduction=reduction)
    return register  # type: ignore[return-value]
