"""Optimal Brain Compression: exact greedy removal, one weight of a row after the other."""

from __future__ import annotations

import torch
from torch import BoolTensor, IntTensor, Tensor

from secateur.errors import PatternError
from secateur.quadratic import by_group, cholesky
from secateur.select import top
from secateur.solvers import refit
from secateur.solvers.keep import keep as keep_only
from secateur.solvers.units import gone
from secateur.types import LayerStats, Need, Pattern, Solution

_BYTES = 128 << 20  # of inverses downdated at once


def obc(
    weight: Tensor, scores: Tensor, keep: IntTensor, pattern: Pattern, stats: LayerStats, *, damp: float = 0.01
) -> Solution:
    """Removes, again and again, the weight with the least ``w_p^2 / [H^-1]_pp`` and updates the others of its row exactly.

    Every row is greedy by itself, with a rank-1 downdate of its own inverse; where rows compete (pattern ``element``) their
    traces are merged, cheapest next removal first. The cost is d^3 a row: for small layers, and to judge other solvers.
    Units must be single weights. Like ``sparsegpt`` it chooses by itself, and what was removed before stays removed.

    Source: Frantar, Singh and Alistarh 2022, Optimal Brain Compression, algorithms 1 and 2 (Hassibi and Stork 1993, eq. 5).
    """
    if pattern.whole_outputs:
        return keep_only(weight, scores, keep, pattern, stats)
    gram = stats.need(Need.GRAM)
    folded = pattern.fold(torch.empty(weight.shape, device="meta")).shape
    if folded[2] != 1:
        raise PatternError(f"solver 'obc' removes single weights; pattern {pattern.name} has units of {folded[2]}")
    matrix, lower, notes = cholesky(gram, damp, stats.name)
    inverse = torch.cholesky_inverse(lower.double())
    rows = by_group(weight, gram)
    removed = gone(scores, pattern, weight.shape).reshape(rows.shape)
    number = torch.arange(folded[0], dtype=torch.int32)[:, None].expand(folded[0], folded[1])
    group = pattern.unfold(number, weight.shape).reshape(rows.shape)  # type: ignore[arg-type]
    targets = folded[1] - keep
    mask = (
        _by_row(inverse, rows, removed, group.long(), targets) if folded[0] > 1 else _merged(inverse, rows, removed, int(keep))
    )
    found = refit.exact(matrix, rows, mask).reshape(weight.shape)
    mask = mask.reshape(weight.shape)  # type: ignore[assignment]
    return Solution(mask, torch.where(mask, found, 0), notes)


def _merged(inverse: Tensor, rows: Tensor, removed: Tensor, keep: int) -> BoolTensor:
    """All rows compete: the whole trace of each, then the cheapest removals that their order allows."""
    mask = torch.ones_like(removed)
    total = rows.numel()
    orders, losses = [], []
    for g, chosen in _chunks(rows):
        order, loss = _trace(inverse[g], rows[g, chosen].double(), removed[g, chosen])
        orders.append(order)
        losses.append(loss)
    # A removal cannot come before the earlier ones of its row: it costs at least as much as any of them.
    loss = torch.cat(losses).cummax(1).values
    taken = top(-loss.reshape(1, -1).float(), torch.tensor([total - keep])).reshape(loss.shape)
    order = torch.cat(orders)
    flat = mask.reshape(-1, rows.shape[2])
    flat.scatter_(1, order, ~taken)
    return mask  # type: ignore[return-value]


def _by_row(inverse: Tensor, rows: Tensor, removed: Tensor, group: Tensor, targets: Tensor) -> BoolTensor:
    """Each row loses what its own groups have to lose."""
    mask = torch.ones_like(removed)
    for g, chosen in _chunks(rows):
        left = targets[group[g, chosen].unique()]
        _, position = group[g, chosen].unique(return_inverse=True)
        mask[g, chosen] = _greedy(inverse[g], rows[g, chosen].double(), removed[g, chosen], position, left)
    return mask  # type: ignore[return-value]


def _chunks(rows: Tensor) -> list[tuple[int, Tensor]]:
    groups, count, width = rows.shape
    step = max(1, _BYTES // (8 * width * width))
    return [(g, chosen) for g in range(groups) for chosen in torch.arange(count).split(step)]


class _Rows:
    """Rows with an inverse each, from which weights are eliminated one at a time."""

    def __init__(self, inverse: Tensor, weight: Tensor):
        self.inverse = inverse.expand(len(weight), *inverse.shape).clone()
        self.weight = weight.clone()

    def losses(self) -> Tensor:
        """``w_p^2 / [H^-1]_pp`` of every weight."""
        return self.weight.square() / self.inverse.diagonal(dim1=1, dim2=2).clamp_min(1e-300)

    def eliminate(self, column: Tensor, active: Tensor) -> None:
        """Remove the weight `column` of each active row and let the others of the row make up for it."""
        taken = self.inverse.gather(1, column[:, None, None].expand(-1, 1, self.inverse.shape[2]))[:, 0]
        pivot = taken.gather(1, column[:, None]).clamp_min(1e-300)
        ratio = torch.where(active[:, None], taken / pivot, 0)
        self.weight -= self.weight.gather(1, column[:, None]) * ratio
        self.inverse.baddbmm_(taken[:, :, None], ratio[:, None, :], alpha=-1)


def _trace(inverse: Tensor, weight: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """The order in which each row would lose all its weights, and what each removal costs; -inf for those gone before."""
    state = _Rows(inverse, weight)
    alive = torch.ones_like(removed)
    everywhere = torch.ones_like(removed[:, 0])
    order = torch.empty(weight.shape, dtype=torch.int64)
    losses = torch.empty_like(weight)
    for step in range(weight.shape[1]):
        cost = state.losses().masked_fill(removed, -torch.inf).masked_fill(~alive, torch.inf)
        losses[:, step], order[:, step] = cost.min(1)
        state.eliminate(order[:, step], everywhere)
        alive.scatter_(1, order[:, step, None], False)
    return order, losses


def _greedy(inverse: Tensor, weight: Tensor, removed: Tensor, group: Tensor, left: Tensor) -> Tensor:
    """Mask of rows in which ``left[group]`` weights of each group go."""
    state, left = _Rows(inverse, weight), left.clone()
    alive = torch.ones_like(removed)
    while bool((active := (alive & (left[group] > 0)).any(1)).any()):
        free = alive & (left[group] > 0)
        cost = state.losses().masked_fill(removed, -torch.inf).masked_fill(~free, torch.inf)
        column = cost.argmin(1)
        state.eliminate(column, active)
        rows = active.nonzero().flatten()
        alive[rows, column[rows]] = False
        left[group[rows, column[rows]]] -= 1
    return alive
