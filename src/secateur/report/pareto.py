"""The Pareto front: the models that no other beats."""

from __future__ import annotations

import math
from collections.abc import Sequence


def front(first: Sequence[float], second: Sequence[float], *, first_higher: bool, second_higher: bool) -> tuple[int, ...]:
    """Indices of the points that no other dominates, by rising `first`.

    A point is dominated where another is at least as good in both and better in one. Equal points are on the front together.
    Points with NaN are on no front. O(n log n).

    >>> front([0.5, 0.9, 0.8], [0.97, 0.90, 0.89], first_higher=True, second_higher=True)
    (0, 1)
    """
    a = [x if first_higher else -x for x in first]
    b = [y if second_higher else -y for y in second]
    order = [i for i in range(len(a)) if not (math.isnan(a[i]) or math.isnan(b[i]))]
    order.sort(key=lambda i: (-a[i], -b[i], i))
    kept: list[int] = []
    best = -math.inf
    for i in order:
        twin = bool(kept) and a[kept[-1]] == a[i] and b[kept[-1]] == b[i]
        if twin or b[i] > best or (not kept):
            kept.append(i)
            best = max(best, b[i])
    return tuple(sorted(kept, key=lambda i: (first[i], i)))
