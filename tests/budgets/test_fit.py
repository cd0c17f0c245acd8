"""Budgets in parameters, MACs and bytes: exact promises, and brute force over every choice on tiny networks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from secateur.budgets.amount import parse_budget
from secateur.budgets.fit import Problem, fit
from secateur.budgets.path import in_scope
from secateur.errors import BudgetError
from secateur.graph import choose_groups, cut, lowest, make_plan, trace, unit_scores
from secateur.graph.choose import competitors
from secateur.measure.macs import macs
from secateur.measure.sizes import sizes

UNITS = ("params", "MACs", "bytes")


class Residual(nn.Module):
    """A residual stream, a concatenation, a grouped convolution and norms: every coupling that counts twice or not at all."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a = nn.Sequential(nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1))
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.b = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(10 * 16, 3)

    def forward(self, x):
        x = self.stem(x)
        x = self.depthwise(x + self.a(x))
        return self.head(torch.cat([x, self.b(x)], 1).flatten(1))


def problem_of(model, example, kinds=("channel", "neuron"), scope="local", round_to=1, min_width=1):
    graph = trace(model, example)
    groups = choose_groups(graph, kinds)
    scores = unit_scores(model, groups, "l1")
    rivals = competitors(graph, groups, scores)
    return Problem(model, graph, rivals, scores, in_scope(rivals, scope, round_to, min_width))


def real(model, problem, kept, example):
    """Parameters, MACs and bytes of the model that is really cut."""
    removed = lowest(problem.graph.groups, problem.scores, {g.id: kept.get(g.id, g.units) for g in problem.graph.groups})
    smaller = cut(model, make_plan(problem.graph, model, removed))
    found = sizes(smaller)
    return {"params": found.parameters, "MACs": macs(smaller, example).dense, "bytes": found.bytes_memory}


@pytest.mark.parametrize("scope", ["local", "isomorphic", "global"])
@pytest.mark.parametrize("unit", UNITS)
def test_what_is_promised_is_what_the_cut_model_has(unit, scope):
    torch.manual_seed(0)
    model, example = Residual().eval(), torch.randn(2, 3, 4, 4)
    problem = problem_of(model, example, scope=scope)
    for share in (100, 75, 50, 30):
        kept, budget = fit(problem, parse_budget(f"{share}% {unit}"))
        assert budget.promised == real(model, problem, kept, example)[unit]
        assert budget.dense == real(model, problem, problem.full, example)[unit]
        assert budget.promised <= budget.limit == share / 100 * budget.dense
        if share == 100:
            assert kept == problem.full


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_brute_force_over_all_widths_finds_no_larger_neighbour_that_fits(unit, scope):
    """Every way to keep units is cut for real; the choice fits, and none that keeps one unit more does."""
    torch.manual_seed(1)
    model, example = (
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 2)),
        torch.randn(2, 4),
    )
    problem = problem_of(model, example, scope=scope)
    ids = [c.groups[0].id for c in problem.competitors]
    table = {
        widths: real(model, problem, dict(zip(ids, widths, strict=True)), example)[unit]
        for widths in itertools.product(*(range(1, c.units + 1) for c in problem.competitors))
    }
    dense, floor = max(table.values()), min(table.values())
    for limit in range(math.ceil(floor), dense + 1, max(1, dense // 25)):
        kept, budget = fit(problem, parse_budget(f"{limit} {'B' if unit == 'bytes' else unit}"))
        widths = tuple(kept[i] for i in ids)
        assert table[widths] == budget.promised <= limit
        for i in range(len(widths)):
            more = (*widths[:i], widths[i] + 1, *widths[i + 1 :])
            assert table.get(more, math.inf) > limit


def test_uniform_budgets_are_one_ratio_and_global_ones_one_threshold():
    """Before room is used up, a prefix of the order is what the sparsity that removes as much would choose."""
    torch.manual_seed(2)
    model, example = Residual().eval(), torch.randn(1, 3, 4, 4)
    local = problem_of(model, example)
    for n in range(len(local.steps)):
        ratios = [1 - step.after / step.of.units for step in local.steps[: n + 1]]
        assert ratios == sorted(ratios)
    everywhere = problem_of(model, example, scope="global")
    scores = [step.score for step in everywhere.steps]
    assert scores == sorted(scores)


def test_widths_keep_to_multiples_and_to_the_least():
    torch.manual_seed(3)
    model, example = (
        nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4)),
        torch.randn(1, 8),
    )
    problem = problem_of(model, example, round_to=4, min_width=8)
    kept, _ = fit(problem, parse_budget("40% params"))
    assert all(n % 4 == 0 and n >= 8 for n in kept.values())


def test_a_budget_that_cannot_be_met_names_the_nearest_and_what_holds_it():
    torch.manual_seed(4)
    model, example = (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)),
        torch.randn(1, 8),
    )
    problem = problem_of(model, example, min_width=4)
    least = real(model, problem, {c.groups[0].id: 4 for c in problem.competitors}, example)["params"]
    with pytest.raises(BudgetError, match=f"nearest that can is {least} params.*min_width") as caught:
        fit(problem, parse_budget("10 params"))
    assert caught.value.nearest == least
    kept, budget = fit(problem, parse_budget(f"{least} params"))
    assert budget.promised == least
    assert set(kept.values()) == {4}


def test_layers_that_cannot_be_cut_are_named_in_the_refusal():
    model, example = (
        nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 2)),
        torch.randn(1, 8),
    )
    graph = trace(model, example)
    groups = choose_groups(graph, ("neuron",), ignore=("2",))
    scores = unit_scores(model, groups, "l1")
    rivals = competitors(graph, groups, scores)
    problem = Problem(model, graph, rivals, scores, in_scope(rivals, "local"), frozenset({"2.weight", "2.bias"}))
    with pytest.raises(BudgetError, match=r"'2\.bias' 300 \(left out by ignore or layers\)"):
        fit(problem, parse_budget("100 params"))
