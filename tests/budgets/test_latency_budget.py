"""Budgets in milliseconds, on a clock that is told what time it is. Real time is never measured here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.budgets.amount import parse_budget
from secateur.budgets.cost import cost_of
from secateur.budgets.fit import Problem, fit
from secateur.budgets.latency import fit_latency
from secateur.budgets.path import by_gain, counts, in_scope
from secateur.budgets.table import latency_table
from secateur.errors import BudgetError
from secateur.graph import choose_groups, cut, lowest, make_plan, trace, unit_scores
from secateur.graph.choose import competitors
from secateur.types import Latency


class FakeClock:
    """An operation takes as long as its tensors have values, in microseconds; a model `factor` times that and `offset` ms."""

    def __init__(self, example: torch.Tensor, *, factor: float = 1.0, offset: float = 0.0):
        self.example, self.factor, self.offset = example, factor, offset
        self.calls = self.models = 0

    def call(self, run: Callable[[], Any]) -> float:
        self.calls += 1
        with _Counting() as counting:
            run()
        return counting.values / 1000

    def model(self, model: nn.Module) -> Latency:
        self.models += 1
        with _Counting() as counting, torch.no_grad():
            model(self.example)
        ms = self.offset + self.factor * counting.values / 1000
        return Latency(ms, 0.9 * ms, 1.1 * ms, 1, len(self.example), 1, "float32", "cpu")


class _Counting(TorchDispatchMode):
    """Sums the values of all tensors that operations other than views are given or give."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.values += sum(t.numel() for t in {id(t): t for t in leaves if isinstance(t, torch.Tensor)}.values())
        return out


@pytest.fixture
def example() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=1), nn.ReLU(),
        nn.Conv2d(32, 48, 3), nn.GroupNorm(4, 48), nn.GELU(), nn.Flatten(), nn.Linear(48 * 36, 16), nn.LayerNorm(16),
        nn.Linear(16, 3),
    ).eval()  # fmt: skip


def problem_of(model: nn.Module, example: torch.Tensor, **widths: int) -> Problem:
    graph = trace(model, example)
    groups = choose_groups(graph, ("channel", "neuron"))
    scores = unit_scores(model, groups, "l1")
    rivals = competitors(graph, groups, scores)
    return Problem(model, graph, rivals, scores, in_scope(rivals, "local", **widths))


def real_cut(problem: Problem, kept: dict[int, int]) -> nn.Module:
    groups = [g for c in problem.competitors for g in c.groups]
    return cut(problem.model, make_plan(problem.graph, problem.model, lowest(groups, problem.scores, kept)))


def test_the_table_is_exact_where_times_are_products_of_widths(example):
    """Values of tensors are products of two lengths at most: between the grid's points nothing is lost."""
    model = network()
    problem, clock = problem_of(model, example), FakeClock(example)
    table = latency_table(problem.graph, problem.widths(), clock.call, torch.device("cpu"))
    dense = clock.model(model).median_ms - table(problem.full)
    for taken in (0, 5, 20, 60, len(problem.steps)):
        kept = counts(problem.competitors, problem.steps[:taken])
        real = clock.model(real_cut(problem, kept)).median_ms
        assert table(kept) + dense == pytest.approx(real, rel=2e-3), "a group norm has as many groups as divide its width"


def test_equal_operations_are_timed_once(example):
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(5)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers, nn.Flatten(), nn.Linear(512, 2)).eval()
    problem, clock = problem_of(model, example), FakeClock(example)
    latency_table(problem.graph, problem.widths(), clock.call, torch.device("cpu"))
    grid, flat = 5, 6  # 1, 2, 4, 6, 8 channels; 1, 64, 128, 256, 384, 512 inputs
    assert clock.calls == grid + grid**2 + grid + flat, "first convolution, inner ones, ReLU, last layer's product"


@pytest.mark.parametrize(("factor", "offset"), [(1.0, 0.0), (1.0, 20.0), (1.6, 5.0), (0.5, 0.0)])
@pytest.mark.parametrize("share", [80, 50, 30])
def test_the_search_ends_within_the_budget_whatever_the_table_misses(example, share, factor, offset):
    model = network()
    problem, clock = problem_of(model, example), FakeClock(example, factor=factor, offset=offset)
    dense = clock.model(model).median_ms
    limit = offset + share / 100 * (dense - offset)
    kept, budget = fit_latency(problem, parse_budget(f"{limit} ms"), clock, lambda table: problem.steps)
    assert budget.achieved == clock.model(real_cut(problem, kept)).median_ms
    assert 0.97 * limit <= budget.achieved <= limit
    assert (budget.low, budget.high) == (pytest.approx(0.9 * budget.achieved), pytest.approx(1.1 * budget.achieved))
    assert budget.dense == dense
    assert clock.models <= 8, "the table says where to look: few models are timed"


def test_a_share_is_of_the_dense_model_and_a_generous_budget_cuts_nothing(example):
    model = network()
    problem, clock = problem_of(model, example), FakeClock(example)
    kept, budget = fit_latency(problem, parse_budget("50% ms"), clock, lambda table: problem.steps)
    assert budget.limit == budget.dense / 2 >= budget.achieved
    kept, budget = fit_latency(problem, parse_budget("1000 ms"), clock, lambda table: problem.steps)
    assert kept == problem.full
    assert budget.achieved == budget.dense


def test_milliseconds_out_of_reach_say_the_nearest(example):
    model = network()
    problem, clock = problem_of(model, example, min_width=4), FakeClock(example, offset=30.0)
    least = clock.model(real_cut(problem, counts(problem.competitors, problem.steps))).median_ms
    with pytest.raises(BudgetError, match=r"nearest that can is .* ms.*do not depend on widths.*min_width") as caught:
        fit_latency(problem, parse_budget("1 ms"), clock, lambda table: problem.steps)
    assert caught.value.nearest == least


def test_by_gain_what_saves_most_for_its_score_goes_first(example):
    """Two equal layers, one on 16 times the positions: its units are worth as much and cost more, so they go first."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
        nn.AvgPool2d(4),
        nn.Conv2d(4, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 2, 1),
    )
    problem = problem_of(model, example)
    early, _, late = problem.competitors
    table = latency_table(problem.graph, problem.widths(), FakeClock(example).call, torch.device("cpu"))
    order = by_gain(problem.competitors, [2, 2, 2], table)
    places = {c: [i for i, step in enumerate(order) if step.of is c] for c in (early, late)}
    assert max(places[early][:8]) < places[late][0]
    assert len(order) == len(problem.steps)
    assert counts(problem.competitors, order) == counts(problem.competitors, problem.steps)


def test_by_gain_looks_over_plateaus(example):
    """Where single steps save nothing, the stride that ends the plateau is weighed."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1))
    problem = problem_of(model, example)
    first, second = problem.competitors

    class Blocks:
        def change(self, kept, changes):
            after = {**kept, **changes}
            return sum(n // 8 * (10 if g == first.groups[0].id else 1) for g, n in after.items()) - sum(
                n // 8 * (10 if g == first.groups[0].id else 1) for g, n in kept.items()
            )

    order = by_gain([first, second], [2, 2], Blocks())
    assert [step.of for step in order[:8]] == [first] * 8, "whole blocks of 8 units at once"


def test_by_gain_a_unit_of_many_layers_is_worth_as_much_more(example):
    """Two equal layers; of one the units belong to 20 times as many layers, so the other goes first although it saves less."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1))
    problem = problem_of(model, example)
    first, second = problem.competitors
    cost = cost_of(model, problem.graph, problem.widths(), "MACs")
    alone = by_gain([first, second], [2, 2], cost)
    shared = by_gain([first, second], [40, 2], cost)
    assert first in {step.of for step in alone[:4]}
    assert {step.of for step in shared[:12]} == {second}


def test_gain_loses_less_score_than_one_ratio_under_the_same_budget(example):
    """Whatever the widths, the score that is kept, in shares of each group's total, is at least that of one ratio for all."""
    model = network()
    uniform = problem_of(model, example)
    for share in (70, 50, 30):
        amount = parse_budget(f"{share}% MACs")
        cost = cost_of(model, uniform.graph, uniform.widths(), "MACs")
        gain = replace(uniform, steps=by_gain(uniform.competitors, [1] * len(uniform.competitors), cost))
        kept = [
            sum(float(c.ranked[: found[c.groups[0].id]].sum() / c.ranked.sum()) for c in uniform.competitors)
            for found in (fit(uniform, amount)[0], fit(gain, amount)[0])
        ]
        assert kept[1] >= kept[0]
