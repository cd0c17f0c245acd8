"""The registry of criteria and the decorator that files them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, TypeVar

from torch import Tensor

from secateur.registry import Registry
from secateur.types import Need, UnitNeed

#: ``criterion(layer: LayerStats, *, options) -> Tensor``: float32 saliency in the weight's canonical shape, higher = keep.
Criterion = Callable[..., Tensor]
F = TypeVar("F", bound=Criterion)

CRITERIA: Registry[Criterion] = Registry("criterion")
#: ``unit_criterion(units: UnitStats, *, options) -> Tensor``: float32 ``[units]``, higher = keep.
UNIT_CRITERIA: Registry[Criterion] = Registry("unit criterion")
#: What a unit criterion looks at: the weights that make a unit, those that read it, the scales of its norms, or whole blocks.
On = Literal["outputs", "inputs", "norms", "blocks"]


def criterion(
    name: str, *, needs: Collection[Need], source: str, reduction: str = "sum", in_turn: bool = False
) -> Callable[[F], F]:
    """File a criterion under `name`. This is all that a new one takes to appear in recipes, the command line and the tests.

    `needs` are the statistics that it reads from `LayerStats`; `source` is the paper, year and equation. `reduction` names
    how a pattern makes a unit's score of its elements' unless the recipe says otherwise: ``sum``, ``mean``, ``l2``, ``max`` or
    ``abs_sum``. With `in_turn` the norms of the inputs are those of the model whose earlier blocks are pruned already. The
    registry entry's facts hold `needs`, `reduction` and `in_turn`.

        @criterion("squared", needs={Need.WEIGHT}, source="an example")
        def squared(layer: LayerStats) -> Tensor:
            '''The square of the weight.'''
            return layer.weight.square()
    """
    wanted = frozenset(needs) | {Need.WEIGHT}
    register = CRITERIA.register(name, source=source, needs=wanted, reduction=reduction, in_turn=in_turn)
    return register  # type: ignore[return-value]


def unit_criterion(
    name: str, *, on: On, source: str, needs: Collection[UnitNeed] = (), comparable: bool = False
) -> Callable[[F], F]:
    """File under `name` a criterion of scores that only whole units have, for patterns that cut units out.

    Of every group of coupled units it is given, one after the other, the tensors that `on` names: ``outputs`` are weights of
    layers whose outputs the units are, ``inputs`` those of layers that read them, ``norms`` the scales of normalisations that
    they go through. What it returns for several tensors of a group is combined as the pattern says, by default averaged.
    ``blocks`` are whole residual blocks, for the pattern ``layer``. `needs` are the statistics that it reads from `UnitStats`.
    `comparable` says that a ranking over all layers takes the scores as they are, where others are divided by their means.

        @unit_criterion("fan_out", on="inputs", source="an example")
        def fan_out(units: UnitStats) -> Tensor:
            '''L2 norm of the weights that read a unit.'''
            return units.weight.norm(dim=1)
    """
    return UNIT_CRITERIA.register(name, source=source, needs=frozenset(needs), on=on, comparable=comparable)  # type: ignore[return-value]
