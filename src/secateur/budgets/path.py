"""The order in which units go: one step after another down the allowed widths, of which a budget takes as many as it must."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from secateur.budgets.cost import Cost
from secateur.graph.choose import Competitor, rivals_of, steps_down

_BUNDLES = 32  # of one competitor's steps: as fine as an order by gain is made
_STRIDES = (1, 2, 4, 8)  # bundles that may go at once


@dataclass(frozen=True, eq=False)
class Step:
    """One competitor (a group, or several that are tied) goes from the width `before` to the next allowed one, `after`."""

    of: Competitor
    before: int
    after: int
    score: float  #: mean score of the units that go

    @property
    def units(self) -> int:
        """How many of the competitor's units go."""
        return self.before - self.after


def steps_of(competitor: Competitor, round_to: int, min_width: int) -> list[Step]:
    """All steps of one competitor, in the order they are taken."""
    means, sizes = steps_down(competitor.ranked, round_to, min_width)
    steps, width = [], competitor.units
    for mean, n in zip(means.flip(0).tolist(), sizes.flip(0).tolist(), strict=True):
        steps.append(Step(competitor, width, width - n, mean))
        width -= n
    return steps


def in_scope(all_of_them: Sequence[Competitor], scope: str, round_to: int = 1, min_width: int = 1) -> list[Step]:
    """The order of a scope: among rivals the lowest score goes first, and all sets of rivals shrink by the same fraction.

    Under ``local`` every prefix of it is one ratio for all, to within a step; under ``global`` it is one threshold.
    """
    placed: list[tuple[float, int, Step]] = []
    for number, rivals in enumerate(rivals_of(all_of_them, scope)):
        steps = [s for r in rivals for s in steps_of(r, round_to, min_width)[::-1]]
        order = torch.tensor([s.score for s in steps]).sort(descending=True, stable=True).indices.flip(0).tolist()
        total, gone = sum(r.units for r in rivals), 0
        for i in order:
            gone += steps[i].units
            placed.append((gone / total, number, steps[i]))
    return [step for *_, step in sorted(placed, key=lambda p: p[:2])]


def by_key(all_of_them: Sequence[Competitor], key: Callable[[Step], float], round_to: int, min_width: int) -> list[Step]:
    """The order of a key that says how much a step hurts; a step hurts at least as much as those before it."""
    placed: list[tuple[float, int, int, Step]] = []
    for number, competitor in enumerate(all_of_them):
        worst = -float("inf")
        for i, step in enumerate(steps_of(competitor, round_to, min_width)):
            worst = max(worst, key(step))
            placed.append((worst, number, i, step))
    return [step for *_, step in sorted(placed, key=lambda p: p[:3])]


def counts(all_of_them: Iterable[Competitor], taken: Iterable[Step] = ()) -> dict[int, int]:
    """Units that every group keeps after the steps taken, by id."""
    kept = {g: n for c in all_of_them for g, n in c.keeping(c.units).items()}
    for step in taken:
        kept.update(step.of.keeping(step.after))
    return kept


def shortest(steps: Sequence[Step], cost: Callable[[Mapping[int, int]], float], full: Mapping[int, int], limit: float) -> int:
    """The fewest leading steps after which the cost, which falls with every step, is within `limit`; -1 where it never is."""

    def after(n: int) -> float:
        kept = dict(full)
        for step in steps[:n]:
            kept.update(step.of.keeping(step.after))
        return cost(kept)

    if after(len(steps)) > limit:
        return -1
    low, high = -1, len(steps)  # too dear at low, within at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if after(middle) <= limit else (middle, high)
    return high


def refill(taken: Sequence[Step], cost: Cost, kept: Mapping[int, int], limit: float) -> dict[int, int]:
    """Take steps back, the last ones first, as far as the limit allows; afterwards not one more can be taken back.

    Units of score -inf were forced to go, and stay away.
    """
    now, left = dict(kept), limit - cost(kept)
    stuck: set[int] = set()
    for step in reversed(taken):
        if id(step.of) in stuck:
            continue
        back = step.of.keeping(step.before)
        more = cost.change(now, back)
        if more <= left and step.score > -float("inf"):
            now.update(back)
            left -= more
        else:
            stuck.add(id(step.of))
    return now


def by_gain(
    all_of_them: Sequence[Competitor], layers: Sequence[int], cost: Cost, round_to: int = 1, min_width: int = 1
) -> list[Step]:
    """The order in which the score lost for each unit of cost saved is least, given what went before.

    `layers` says for each competitor to how many layers its units belong. A unit's score counts as its share of its
    competitor's total, once for each of those layers: what is lost of a residual stream is lost in every block. Where one step
    saves nothing, as kernels that work on blocks of channels have it, strides of 2, 4 and 8 are weighed as well.
    """
    bundles = [_bundles(steps_of(c, round_to, min_width)) for c in all_of_them]
    worth = [n / max(float(c.ranked.clamp(min=0).sum()), 1e-30) for c, n in zip(all_of_them, layers, strict=True)]
    kept, position, order = counts(all_of_them), [0] * len(bundles), list[Step]()

    def best(i: int) -> tuple[float, int, int]:
        """The least loss per saving of the next strides of competitor `i`, and how long that stride is."""
        rates = []
        for stride in _STRIDES:
            ahead = bundles[i][position[i] : position[i] + stride]
            if len(ahead) == stride:
                lost = sum(max(s.score, 0.0) * s.units for bundle in ahead for s in bundle) * worth[i]
                saved = -cost.change(kept, all_of_them[i].keeping(ahead[-1][-1].after))
                rates.append((lost / saved if saved > 0 else float("inf"), i, stride))
        return min(rates)

    queue = [best(i) for i in range(len(bundles)) if bundles[i]]
    heapq.heapify(queue)
    while queue:
        now = best(heapq.heappop(queue)[1])  # what went since it was queued may have changed its rate
        if queue and now > queue[0]:
            heapq.heappush(queue, now)
            continue
        _, i, stride = now
        taken = [s for bundle in bundles[i][position[i] : position[i] + stride] for s in bundle]
        order += taken
        kept.update(all_of_them[i].keeping(taken[-1].after))
        position[i] += stride
        if position[i] < len(bundles[i]):
            heapq.heappush(queue, best(i))
    return order


def _bundles(steps: Sequence[Step]) -> list[Sequence[Step]]:
    """At most `_BUNDLES` runs of neighbouring steps."""
    size = -(-len(steps) // _BUNDLES) or 1
    return [steps[i : i + size] for i in range(0, len(steps), size)]
