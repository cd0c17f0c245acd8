"""Budgets in milliseconds: the search goes by the table of operations, the answer by timing models that were really cut."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from secateur.budgets.amount import Amount
from secateur.budgets.cost import Cost
from secateur.budgets.fit import Problem
from secateur.budgets.path import Step, counts
from secateur.budgets.table import latency_table
from secateur.data.batches import Batch, device_of
from secateur.errors import BudgetError
from secateur.graph import cut, lowest, make_plan
from secateur.measure.latency import compare_latency, module_shares
from secateur.progress import advance
from secateur.types import Budget, Latency

log = logging.getLogger("secateur")
_ROUNDS = 10
_NEAR = 0.97  # a model that needs this share of the budget or more is near enough
_SECONDS = 0.8
_MOST_RUNS, _FEWEST_RUNS, _ENOUGH_S = 30, 3, 4e-3


class Clock(Protocol):
    """What tells the time: of one call, and of a model on the example."""

    def call(self, run: Callable[[], Any]) -> float:
        """Milliseconds of `run`."""

    def model(self, model: nn.Module) -> Latency:
        """Latency of `model` on the example."""


class Stopwatch:
    """Real time. Models are timed taking turns with the dense one, so that what disturbs the machine disturbs both alike.

    The milliseconds of a cut model are those of the dense one, timed once at first, divided by the median speed-up: two
    figures of one search compare even where the machine's load changes meanwhile.
    """

    def __init__(self, dense: nn.Module, example: Batch):
        self._dense, self._example, self._device = dense, example, device_of(dense)
        self._reference: Latency | None = None

    def call(self, run: Callable[[], Any]) -> float:
        """Median of 3 to 30 runs after one that does not count."""
        times: list[float] = []
        self._timed(run)
        while len(times) < _FEWEST_RUNS or (sum(times) < _ENOUGH_S and len(times) < _MOST_RUNS):
            times.append(self._timed(run))
        return 1e3 * statistics.median(times)

    def _timed(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter() - start

    def inside(self, names: Sequence[str]) -> dict[str, float]:
        """Milliseconds that each of these modules takes in a run of the dense model."""
        shares = module_shares(self._dense, self._example, names, seconds=_SECONDS)
        return {name: share * self.model(self._dense).median_ms for name, share in shares.items()}

    def model(self, model: nn.Module) -> Latency:
        """Median and quartiles, on the example and with the threads in force."""
        if self._reference is None:
            self._reference = compare_latency({"": self._dense}, self._example, seconds=_SECONDS)[""].latency
        if model is self._dense:
            return self._reference
        found = compare_latency({"dense": self._dense, "cut": model}, self._example, seconds=_SECONDS)["cut"]
        reference = self._reference.median_ms
        conditions = {k: getattr(found.latency, k) for k in ("runs", "batch", "threads", "dtype", "device")}
        return Latency(reference / found.speedup, reference / found.high, reference / found.low, **conditions)


@dataclass
class _Line:
    """Milliseconds of the model from those of the table: how the table errs, and what runs beside the operations."""

    offset: float
    slope: float

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> _Line:
        """The nearest line to points ``(table, real)``; one point says how many times too fast or slow the table is."""
        (x, y), (mean_x, mean_y) = points[0], (statistics.fmean(p[i] for p in points) for i in (0, 1))
        spread = sum((a - mean_x) ** 2 for a, _ in points)
        if not spread:
            return cls(0.0, y / x if x else 0.0)
        slope = max(sum((a - mean_x) * (b - mean_y) for a, b in points) / spread, 0.0)  # fewer operations take no longer
        return cls(mean_y - slope * mean_x, slope)

    def __call__(self, table_ms: float) -> float:
        return self.offset + self.slope * table_ms


def fit_latency(
    problem: Problem, amount: Amount, clock: Clock, order: Callable[[Cost], Sequence[Step]]
) -> tuple[dict[int, int], Budget]:
    """Units that each group keeps, by id, so that the model runs within `amount` milliseconds; what that promises and gives.

    The table of operations says along `order` where the budget is met; the model is cut there and timed, the table is
    corrected by what was found, and so on until a model is within 3% below the budget, or within it by one step. Of the models
    that were timed the largest within the budget is chosen. Raises BudgetError where cutting everything is not enough.
    """
    dense = clock.model(problem.model)
    limit = amount.limit(dense.median_ms)
    if dense.median_ms <= limit:
        figures = dense.median_ms, dense.median_ms, dense.low_ms, dense.high_ms
        return problem.full, Budget(amount.text, "ms", dense.median_ms, limit, *figures)
    table = latency_table(problem.graph, problem.widths(), clock.call, device_of(problem.model))
    steps = list(order(table))
    search = _Search(problem, steps, _along(table, steps, problem.full), clock, dense)
    n = search.run(limit)
    if n is None:
        nearest = min(found.median_ms for found in search.timed.values())
        raise BudgetError(amount.text, "ms", limit, nearest, dense.median_ms, *_what_holds(problem, search))
    found = search.timed[n]
    figures = (search.promised[n], found.median_ms, found.low_ms, found.high_ms)
    return counts(problem.competitors, steps[:n]), Budget(amount.text, "ms", dense.median_ms, limit, *figures)


def _along(table: Cost, steps: Sequence[Step], full: Mapping[int, int]) -> list[float]:
    """The table's milliseconds after each number of leading steps."""
    kept = dict(full)
    found = [table(kept)]
    for step in steps:
        change = step.of.keeping(step.after)
        found.append(found[-1] + table.change(kept, change))
        kept.update(change)
    return found


def _what_holds(problem: Problem, search: _Search) -> list[str]:
    line, floor = search.line(), search.table_ms[-1]
    found = [f"with all groups at their least the operations that can shrink still take {line.slope * floor:.3g} ms"]
    if line.offset > 0:
        found.append(f"{line.offset:.3g} ms do not depend on widths")
    least = counts(problem.competitors, search.steps)
    if any(n > 1 for n in least.values()):
        found.append("widths stay at min_width and at multiples of round_to")
    return found


class _Search:
    """Looks for the fewest leading steps after which the model is fast enough, by cutting it and timing it."""

    def __init__(self, problem: Problem, steps: Sequence[Step], table_ms: Sequence[float], clock: Clock, dense: Latency):
        self.problem, self.steps, self.table_ms, self.clock = problem, steps, table_ms, clock
        self.timed: dict[int, Latency] = {0: dense}
        self.promised: dict[int, float] = {}

    def run(self, limit: float) -> int | None:
        """Number of steps, or None where all of them are not enough."""
        slow, fast = 0, len(self.steps) + 1  # too slow at `slow`, fast enough at `fast`
        for turn in range(_ROUNDS):
            if fast - slow <= 1:
                break
            advance("timing cut models", turn, _ROUNDS)
            last_chance = turn + 1 == _ROUNDS and fast > len(self.steps)
            ms = self._time(n := len(self.steps) if last_chance else self._guess((1 + _NEAR) / 2 * limit, slow, fast))
            slow, fast = (slow, n) if ms <= limit else (n, fast)
            if _NEAR * limit <= ms <= limit:
                break
        advance("timing cut models", _ROUNDS, _ROUNDS)
        within = [n for n, found in self.timed.items() if found.median_ms <= limit]
        return min(within) if within else None

    def line(self, slow: int = 0, fast: int | None = None) -> _Line:
        """What the table's milliseconds mean: through two models if they are given, else through all that were timed."""
        among = self.timed if fast is None else (slow, fast)
        return _Line.through([(self.table_ms[n], self.timed[n].median_ms) for n in sorted(among)])

    def _guess(self, target: float, slow: int, fast: int) -> int:
        """The fewest steps, between those known to be too few and enough, that the table, corrected, holds to be enough."""
        between = range(slow + 1, min(fast, len(self.steps) + 1))
        line = self.line(slow, fast if fast in self.timed else None)
        n = next((i for i in between if line(self.table_ms[i]) <= target), between[-1])
        stuck = len(self.timed) > 2 and n in (between[0], between[-1])
        self.promised[n := between[len(between) // 2] if stuck else n] = line(self.table_ms[n])
        return n

    def _time(self, n: int) -> float:
        problem = self.problem
        self.promised.setdefault(n, self.line()(self.table_ms[n]))
        kept = counts(problem.competitors, self.steps[:n])
        groups = [g for c in problem.competitors for g in c.groups]
        removed = lowest(groups, problem.scores, kept)
        found = self.clock.model(cut(problem.model, make_plan(problem.graph, problem.model, removed)))
        log.info(
            "budget: %d of %d steps, %.3f ms promised, %.3f ms found", n, len(self.steps), self.promised[n], found.median_ms
        )
        self.timed[n] = found
        return found.median_ms
