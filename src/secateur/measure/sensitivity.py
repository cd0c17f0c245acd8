"""What sensitivity curves say: how much quality a layer costs at any sparsity, and how sparse each may be."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secateur.types import Sensitivity


@dataclass(frozen=True)
class Damage:
    """Quality lost by pruning one layer: straight lines between the measured points, never falling as sparsity grows."""

    sparsity: tuple[float, ...]  #: ascending, from 0
    lost: tuple[float, ...]  #: ascending, from 0

    def at(self, sparsity: float) -> float:
        """Quality lost at a sparsity; beyond the last point the last line goes on."""
        points = list(zip(self.sparsity, self.lost, strict=True))
        if len(points) < 2:
            return 0.0
        (a, low), (b, high) = next(((p, q) for p, q in itertools.pairwise(points) if sparsity <= q[0]), tuple(points[-2:]))
        return low + (high - low) * (sparsity - a) / (b - a)

    def bears(self, lost: float) -> float:
        """The largest measured or interpolated sparsity at which no more than `lost` is lost. A block goes or stays."""
        found = 0.0
        for (a, low), (b, high) in itertools.pairwise(zip(self.sparsity, self.lost, strict=True)):
            if high <= lost:
                found = b
            elif low <= lost and b < 1:
                return a + (b - a) * (lost - low) / (high - low)
        return found


def damages(curves: Sequence[Sensitivity]) -> dict[str, Damage]:
    """The damage to each layer's quality, by the layer's name.

    Curves do not say whether more is better. Pruning hurts on the whole: where the sum of all qualities rises by it, they are
    losses.

    >>> damages([Sensitivity("a", (0.0, 0.5), (0.9, 0.7))])["a"].at(0.25)
    0.10000000000000003
    """
    sign = _direction(curves)
    found = {}
    for curve in curves:
        lost = [max(sign * (q - curve.quality[0]), 0.0) for q in curve.quality]
        found[curve.layer] = Damage(curve.sparsity, tuple(itertools.accumulate(lost, max)))
    return found


def worth_of_wholes(curves: Sequence[Sensitivity]) -> dict[str, float]:
    """The quality lost without each of the blocks that curves are about, by name; less than 0 where it is better without."""
    sign = _direction(curves)
    return {c.layer: sign * (c.quality[-1] - c.quality[0]) for c in curves}


def _direction(curves: Sequence[Sensitivity]) -> int:
    """1 where the curves are losses, -1 where more is better."""
    return 1 if sum(q - curve.quality[0] for curve in curves for q in curve.quality) > 0 else -1


def propose(curves: Sequence[Sensitivity], *, loss: float = 0.01) -> Mapping[str, float]:
    """For each layer the sparsity at which pruning it alone loses the fraction `loss` of the dense model's quality.

    Every layer is taken to the same damage, as Han et al. 2015 and Li et al. 2017 choose thresholds layer by layer from such
    curves: layers that bear much get more. No layer gets more than the largest sparsity that was tried.

    >>> propose([Sensitivity("a", (0.0, 0.5), (1.0, 0.98))])
    {'a': 0.25}
    """
    found = damages(curves)
    return {c.layer: round(found[c.layer].bears(loss * abs(c.quality[0])), 4) for c in curves}
