"""Which whole blocks go so that a model keeps to its budget: as little of what they are worth as that takes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from secateur.budgets.amount import Amount
from secateur.budgets.cost import multiply_adds
from secateur.errors import BudgetError
from secateur.graph import Graph, cut
from secateur.graph.blocks import plan_without
from secateur.progress import advance
from secateur.types import Budget, Latency

log = logging.getLogger("secateur")
_ROUNDS = 10
_NEAR = 0.97  # a model that needs this share of the budget or more is near enough

#: What the model costs without the blocks of these names.
BlockCost = Callable[[Sequence[str]], float]
#: The blocks that go so that a cost is at most a limit, or None where no choice is enough.
Choice = Callable[[BlockCost, float], list[str] | None]


def cheapest(worth: Sequence[float], saved: Sequence[float], needed: float) -> list[int] | None:
    """The choice of blocks that together save at least `needed` and are worth least, of which not one could as well stay.

    Exact, by the list of all choices that no other is better than in both (Nemhauser and Ullmann 1969, Discrete dynamic
    programming and capital allocation); equal blocks keep it short. Less than nothing, which a block can be worth that does
    harm, counts as nothing. None where all together do not save enough.

    >>> cheapest([3.0, 2.0, 2.0], [10.0, 5.0, 5.0], 10.0)
    [0]
    """
    best: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]  # (saved, worth, chosen), both rising
    for i, (gain, price) in enumerate(zip(saved, worth, strict=True)):
        with_it = [(s + gain, w + max(price, 0.0), (*chosen, i)) for s, w, chosen in best if s < needed]
        best = _undominated([*best, *with_it], needed)
    found = next((list(chosen) for s, _, chosen in best if s >= needed), None)
    for i in sorted(found or (), key=lambda i: -worth[i]):
        if found and sum(saved[j] for j in found if j != i) >= needed:
            found.remove(i)
    return found


def _undominated(
    choices: list[tuple[float, float, tuple[int, ...]]], needed: float
) -> list[tuple[float, float, tuple[int, ...]]]:
    """Choices that no other betters; of those that save enough only the one that is worth least."""
    enough = min((c for c in choices if c[0] >= needed), key=lambda c: (c[1], c[0]), default=None)
    least = math.inf
    left = []
    for choice in sorted((c for c in choices if c[0] < needed), key=lambda c: (-c[0], c[1], c[2])):
        if choice[1] < least:
            least = choice[1]
            left.append(choice)
    return left[::-1] + ([enough] if enough else [])


def cost_of_blocks(model: nn.Module, graph: Graph, names: Sequence[str], unit: str) -> BlockCost:
    """What `model` costs in ``params``, ``bytes`` or ``MACs`` without some of the blocks `names`, as `sc.measure` counts it."""
    if unit == "MACs":
        each = [multiply_adds(node) for node in graph.recording.nodes]
        whole, wanted = sum(each), set(names)
        inside = {c.module: sum(each[c.first : c.last]) for c in graph.recording.calls if c.module in wanted}
        return lambda gone: whole - sum(inside[name] for name in gone)
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    if unit == "bytes":
        tensors |= dict(model.named_buffers(remove_duplicate=False))

    def cost(gone: Sequence[str]) -> float:
        lost = tuple(f"{name}." for name in gone)
        left = {id(t): t for n, t in tensors.items() if not n.startswith(lost)}
        return sum(t.numel() * (t.element_size() if unit == "bytes" else 1) for t in left.values())

    return cost


class BlockClock(Protocol):
    """What tells the time: of a model on the example, and of the blocks inside of it."""

    def model(self, model: nn.Module) -> Latency:
        """Latency of `model` on the example."""

    def inside(self, names: Sequence[str]) -> dict[str, float]:
        """Milliseconds that each of these modules takes in a run of the dense model."""


@dataclass(frozen=True)
class BlockProblem:
    """A model, the blocks that may go, and what chooses among them. With `one_stays` not all of them may go."""

    model: nn.Module
    graph: Graph
    names: Sequence[str]
    choose: Choice
    one_stays: bool

    def without(self, names: Sequence[str]) -> nn.Module:
        """A copy without these blocks."""
        return cut(self.model, plan_without(self.graph, self.model, names)) if names else self.model


def fit_blocks(problem: BlockProblem, amount: Amount) -> tuple[list[str], Budget]:
    """Blocks to take out so that parameters, bytes or MACs stay within `amount`, and what that promises, which is exact.

    Raises BudgetError where all that may go is not enough.
    """
    cost = cost_of_blocks(problem.model, problem.graph, problem.names, amount.unit)
    dense = cost([])
    limit = amount.limit(dense)
    gone = problem.choose(cost, limit)
    if gone is None:
        raise BudgetError(amount.text, amount.unit, limit, cost(_most(problem, cost)), dense, *_reasons(problem))
    return gone, Budget(amount.text, amount.unit, dense, limit, cost(gone))


def _most(problem: BlockProblem, cost: BlockCost) -> list[str]:
    """The blocks without which the model costs least: all of them, or all but one."""
    names = list(problem.names)
    fewer = [[n for n in names if n != stays] for stays in names] if problem.one_stays else [names]
    return min(fewer, key=cost)


def _reasons(problem: BlockProblem) -> list[str]:
    blocks = f"{len(problem.names)} blocks may go" + (", but one of them stays" if problem.one_stays else "")
    return [f"{blocks}, and with it all that is in no such block"]


def fit_blocks_latency(problem: BlockProblem, amount: Amount, clock: BlockClock) -> tuple[list[str], Budget]:
    """Blocks to take out so that the model runs within `amount` milliseconds, and what that promises and gives.

    The time of each block inside the dense model says which choice might do; the model is cut and timed, what was found
    corrects the sum, and so on, until a model is at most 3% below the budget or no other choice lies between one that is too
    slow and one that is not. Of the models within the budget the slowest is taken. Raises BudgetError where none is.
    """
    dense = clock.model(problem.model)
    limit = amount.limit(dense.median_ms)
    inside = clock.inside(problem.names)

    def table(gone: Sequence[str]) -> float:
        return dense.median_ms - sum(inside[name] for name in gone)

    timed: dict[tuple[str, ...], Latency] = {}
    promised: dict[tuple[str, ...], float] = {}
    slow, fast, allowed = dense.median_ms, -math.inf, (1 + _NEAR) / 2 * limit  # in milliseconds of the table
    scale = 1.0  # milliseconds saved for each that the table says
    for turn in range(_ROUNDS):
        advance("timing cut models", turn, _ROUNDS)
        gone = problem.choose(table, allowed)
        if gone is None:
            gone = _most(problem, table)
        if (key := tuple(gone)) in timed:
            break
        promised[key] = dense.median_ms - scale * (dense.median_ms - table(gone))
        timed[key] = found = clock.model(problem.without(gone))
        log.info("budget: %d blocks, %.3f ms promised, %.3f ms found", len(gone), promised[key], found.median_ms)
        if _NEAR * limit <= found.median_ms <= limit:
            break
        slow, fast = (slow, max(fast, table(gone))) if found.median_ms <= limit else (min(slow, table(gone)), fast)
        saved = dense.median_ms - table(gone)
        scale = (dense.median_ms - found.median_ms) / saved if saved > 0 and found.median_ms < dense.median_ms else scale
        allowed = _between(problem, table, timed, slow, fast, dense.median_ms - (dense.median_ms - limit) / scale)
    advance("timing cut models", _ROUNDS, _ROUNDS)
    within = [key for key, found in timed.items() if found.median_ms <= limit]
    if not within:
        nearest = min(found.median_ms for found in timed.values())
        raise BudgetError(amount.text, "ms", limit, nearest, dense.median_ms, *_reasons(problem))
    key = max(within, key=table)
    figures = (promised[key], timed[key].median_ms, timed[key].low_ms, timed[key].high_ms)
    return list(key), Budget(amount.text, "ms", dense.median_ms, limit, *figures)


def _between(
    problem: BlockProblem, table: BlockCost, timed: dict[tuple[str, ...], Latency], slow: float, fast: float, guess: float
) -> float:
    """The table's limit to try next, below one known as too slow: the guess, or just less than that where it is known."""
    just_less = math.nextafter(slow, -math.inf)
    if fast < guess < slow and tuple(problem.choose(table, guess) or ()) not in timed:
        return guess
    return just_less
