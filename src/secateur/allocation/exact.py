"""From wished densities to whole counts whose total is the asked one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import IntTensor

from secateur.select import removed_count, spread
from secateur.types import UnitScores


def exact_counts(layers: Mapping[str, UnitScores], density: Mapping[str, float], sparsity: float) -> dict[str, IntTensor]:
    """Units kept in each layer near ``density[name]``, so that the weights removed are those of `sparsity`.

    Wishes are rounded down, and the units still to be kept go to the largest remainders. Where one unit stands for several
    weights the total stays within one unit of the target, on the side of keeping more. No layer keeps more units than it has
    left, so that what was removed before stays removed.
    """
    wish = {n: density[n] * u.total for n, u in layers.items()}
    left = {n: u.left for n, u in layers.items()}
    kept = {n: min(int(wish[n]), left[n]) for n in layers}
    total = sum(u.total * u.elements for u in layers.values())
    missing = total - removed_count(total, sparsity) - sum(kept[n] * u.elements for n, u in layers.items())
    while missing > 0 and (open_ := [n for n in layers if kept[n] < left[n]]):
        step = max(1, missing // sum(layers[n].elements for n in open_))
        for name in sorted(open_, key=lambda n: kept[n] - wish[n]):
            if missing <= 0:
                break
            more = min(step, left[name] - kept[name])
            kept[name] += more
            missing -= more * layers[name].elements
    return {n: spread(kept[n], u.groups) for n, u in layers.items()}
