"""Choose which units go: how many of each group, and which of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.errors import RecipeError, UnknownName
from secateur.graph.graph import Graph, Group
from secateur.select import removed_count, top
from secateur.sparsity import check_sparsity

#: Which groups' units compete: those of one group, those of groups that do the same in different blocks, or all.
Scope = Literal["local", "isomorphic", "global"]


def select(
    graph: Graph,
    groups: Sequence[Group],
    scores: Mapping[int, Tensor],
    sparsity: float,
    *,
    round_to: int = 1,
    min_width: int = 1,
    scope: Scope = "local",
) -> dict[int, list[int]]:
    """Units that go, by group: the lowest scores, exactly as many as the sparsity says; among equal ones the higher index goes.

    See `kept_counts` for the arguments.
    """
    keep = kept_counts(graph, groups, scores, sparsity, round_to=round_to, min_width=min_width, scope=scope)
    return lowest(groups, scores, keep)


def lowest(groups: Iterable[Group], scores: Mapping[int, Tensor], keep: Mapping[int, int]) -> dict[int, list[int]]:
    """Units that go when each group keeps its ``keep[id]`` best ones. Groups that lose nothing are left out."""
    alike: dict[tuple[int, torch.dtype], list[int]] = {}  # what has one shape is chosen in one go
    cut = [g for g in groups if keep[g.id] < g.units]
    for group in cut:
        alike.setdefault((group.units, scores[group.id].dtype), []).append(group.id)
    removed: dict[int, list[int]] = {}
    for ids in alike.values():
        stays = top(torch.stack([scores[i] for i in ids]), torch.tensor([keep[i] for i in ids]))
        removed |= {i: (~row).nonzero().flatten().tolist() for i, row in zip(ids, stays, strict=True)}
    return {g.id: removed[g.id] for g in cut}


def kept_counts(
    graph: Graph,
    groups: Sequence[Group],
    scores: Mapping[int, Tensor],
    sparsity: float,
    *,
    round_to: int = 1,
    min_width: int = 1,
    scope: Scope = "local",
) -> dict[int, int]:
    """How many units each group keeps, by id.

    Of the units that compete (see `Scope`) together `sparsity` goes, by exact count: the nearest whole number, halves up. With
    `round_to` widths fall in steps to multiples of it, each step weighed by the mean score of its units, and the total is the
    nearest that whole steps allow; a group that loses nothing keeps its width. At least `min_width` units stay in each.
    Groups that are tied keep the same fraction and compete as one, which has the units of the smallest of them.
    """
    share = check_sparsity(sparsity)
    for name, value in (("round_to", round_to), ("min_width", min_width)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RecipeError(f"{name} must be a whole number of at least 1, got {value!r}")
    kept = {}
    for rivals in rivals_of(competitors(graph, groups, scores), scope):
        for rival, width in zip(rivals, _widths(rivals, share, round_to, min_width), strict=True):
            kept.update(rival.keeping(width))
    return kept


@dataclass(frozen=True)
class Competitor:
    """A group, or several that are tied. `ranked [units]` are the scores of their units, best first."""

    groups: tuple[Group, ...]
    ranked: Tensor

    @property
    def units(self) -> int:
        """Units of the smallest group."""
        return len(self.ranked)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Equal for those that do the same in different blocks."""
        return tuple(g.shape for g in self.groups)

    def keeping(self, width: int) -> dict[int, int]:
        """Units that each of its groups keeps, by id, when `width` of its units stay."""
        return {g.id: width * g.units // self.units for g in self.groups}


def competitors(graph: Graph, groups: Sequence[Group], scores: Mapping[int, Tensor]) -> list[Competitor]:
    """The groups as they compete: those that are tied as one."""
    found, seen = [], set[int]()
    for group in groups:
        if group.id in seen:
            continue
        together = tuple(graph.groups[i] for i in sorted({group.id, *group.ties}))
        seen.update(g.id for g in together)
        smallest = min(g.units for g in together)
        ranked = [scores[g.id].double().sort(descending=True).values for g in together]
        if len(together) > 1:
            ranked = [torch.stack([F.adaptive_avg_pool1d(r[None], smallest)[0] for r in ranked]).mean(0)]
        found.append(Competitor(together, ranked[0]))
    return found


def named(all_of_them: Iterable[Competitor]) -> dict[str, Competitor]:
    """Competitors by the first tensor that they cut, numbered where several cut the same one first."""
    found: dict[str, Competitor] = {}
    for c in all_of_them:
        name, number = c.groups[0].name, 2
        while name in found:
            name, number = f"{c.groups[0].name} ({number})", number + 1
        found[name] = c
    return found


def rivals_of(all_of_them: Sequence[Competitor], scope: str) -> list[list[Competitor]]:
    """Sets of competitors whose units compete with each other."""
    if scope == "local":
        return [[c] for c in all_of_them]
    if scope == "global":
        return [list(all_of_them)]
    if scope != "isomorphic":
        raise UnknownName("scope", str(scope), get_args(Scope))
    alike: dict[tuple[Any, ...], list[Competitor]] = {}
    for c in all_of_them:
        alike.setdefault(c.shape, []).append(c)
    return list(alike.values())


def _widths(rivals: Sequence[Competitor], sparsity: float, round_to: int, min_width: int) -> list[int]:
    """The width of each rival after the steps with the lowest mean scores, down the ladders of allowed widths, are taken."""
    target = removed_count(sum(r.units for r in rivals), sparsity)
    if len(rivals) == 1 and round_to == 1:  # one ladder of single units: as many steps down as fit
        return [rivals[0].units - min(target, max(rivals[0].units - min_width, 0))]
    steps = [steps_down(r.ranked, round_to, min_width) for r in rivals]
    means, sizes = (np.concatenate([own.cpu().numpy() for own in part]) for part in zip(*steps, strict=True))
    owner = np.repeat(np.arange(len(rivals)), [len(m) for m, _ in steps])
    # Among equal scores the lower index is kept: so the order of removal is the flipped order of a stable descending sort.
    order = np.argsort(-means, kind="stable")[::-1]
    taken = order[2 * sizes[order].cumsum() - sizes[order] <= 2 * target]  # at least half of the last step fits
    gone = np.bincount(owner[taken], sizes[taken], len(rivals))
    return [r.units - int(n) for r, n in zip(rivals, gone, strict=True)]


def steps_down(ranked: Tensor, round_to: int, min_width: int) -> tuple[Tensor, Tensor]:
    """Mean score and number of units of every step from one allowed width to the next, best first.

    Allowed are multiples of `round_to` from `min_width` on, and all units.
    """
    first = -(-min_width // round_to) * round_to
    open_ = ranked[first:]
    if round_to == 1:
        return open_, torch.ones(len(open_), dtype=torch.int64)
    whole = len(open_) // round_to
    means = [open_[: whole * round_to].reshape(-1, round_to).mean(1)]
    sizes = [torch.full((whole,), round_to, dtype=torch.int64)]
    if rest := len(open_) % round_to:
        means.append(open_[-rest:].mean()[None])
        sizes.append(torch.tensor([rest]))
    return torch.cat(means), torch.cat(sizes)


__all__ = ["Competitor", "Scope", "competitors", "kept_counts", "lowest", "named", "rivals_of", "select", "steps_down"]
