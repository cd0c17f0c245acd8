"""Dynamic programming against every choice there is, and OWL by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.allocation import ALLOCATIONS
from secateur.allocation.dynamic import least_error
from secateur.errors import RecipeError
from secateur.patterns import make_pattern
from secateur.quadratic import output_error
from secateur.solvers import SOLVERS
from secateur.solvers.curve import LEVELS, error_curve
from secateur.types import LayerStats, UnitScores


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(
            st.lists(st.tuples(st.integers(0, 9), st.integers(0, 50)), min_size=1, max_size=4), min_size=n, max_size=n
        )
    ),
    st.integers(0, 25),
)
def test_no_choice_within_the_budget_is_better(layers, budget):
    costs, errors = [[c for c, _ in layer] for layer in layers], [[float(e) for _, e in layer] for layer in layers]
    allowed = [
        sum(errors[i][k] for i, k in enumerate(choice))
        for choice in itertools.product(*(range(len(layer)) for layer in layers))
        if sum(costs[i][k] for i, k in enumerate(choice)) <= budget
    ]
    if not allowed:
        with pytest.raises(RecipeError, match="more than the budget"):
            least_error(costs, errors, budget)
        return
    picked = least_error(costs, errors, budget)
    assert sum(c[k] for c, k in zip(costs, picked, strict=True)) <= budget
    assert sum(e[k] for e, k in zip(errors, picked, strict=True)) == min(allowed)


def layer(name: str, groups: int, units: int, scale: float) -> UnitScores:
    curve = {s: scale * s**3 for s in (0.25, 0.5, 0.75)}
    return UnitScores(name, torch.Size((groups, units)), groups, units, 1, lambda: torch.ones(groups, units), curve)


def test_each_layer_takes_its_own_n_of_four():
    layers = {n: layer(n, g, 4, s) for n, g, s in (("a", 10, 1.0), ("b", 10, 0.1), ("c", 20, 0.01), ("d", 5, 0.5))}
    for sparsity in (0.25, 0.4, 0.5, 0.7):
        counts = ALLOCATIONS["dynamic"].make(layers, sparsity)
        kept = [int(c[0]) for c in counts.values()]
        assert all(len(c.unique()) == 1 for c in counts.values()), "every group of a layer alike"
        budget = 180 - round(180 * sparsity)

        def error(choice):
            return sum(0.0 if k == 4 else u.curve[1 - k / 4] for k, u in zip(choice, layers.values(), strict=True))

        best = min(
            error(c)
            for c in itertools.product(range(1, 5), repeat=4)
            if sum(k * u.groups for k, u in zip(c, layers.values(), strict=True)) <= budget
        )
        assert error(kept) == pytest.approx(best)


def test_a_layer_that_errs_little_loses_more_and_the_total_is_exact():
    layers = {"much": layer("much", 1, 5000, 1.0), "little": layer("little", 1, 5000, 0.1)}
    counts = ALLOCATIONS["dynamic"].make(layers, 0.6)
    assert int(counts["much"]) + int(counts["little"]) == 4000
    assert int(counts["much"]) > 2 * int(counts["little"]) > 0


def test_without_curves_it_says_what_is_missing():
    bare = UnitScores("w", torch.Size((8, 8)), 1, 64, 1, lambda: torch.ones(1, 64))
    with pytest.raises(RecipeError, match="error curve of 'w'"):
        ALLOCATIONS["dynamic"].make({"w": bare}, 0.5)
    with pytest.raises(RecipeError, match="data="):
        sc.prune(nn.Linear(8, 8), sparsity=0.5, allocation="dynamic")


def test_the_curve_is_the_error_that_sparsegpt_has():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    stats = LayerStats("w", torch.randn(8, 16, generator=generator), gram=(x.t() @ x)[None])
    made = make_pattern("element")
    curve = error_curve(stats.weight, stats.weight.abs().reshape(1, -1), made, stats)
    assert tuple(curve) == LEVELS
    assert list(curve.values()) == sorted(curve.values())
    half = SOLVERS["sparsegpt"].make(stats.weight, stats.weight.abs().reshape(1, -1), torch.tensor([64]), made, stats)
    assert curve[0.5] == output_error(stats.gram, stats.weight, half.weight)
    groups = make_pattern("n:4")
    assert list(error_curve(stats.weight, groups.fold(stats.weight.abs())[..., 0], groups, stats)) == [0.75, 0.5, 0.25]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def test_prune_with_it_and_with_n_of_four():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(64, 16) @ torch.randn(16, 16)
    result = sc.prune(model, sparsity=0.6, allocation="dynamic", solver="sparsegpt", data=[x])
    assert result.masks.total() - result.masks.kept() == math.floor(0.6 * result.masks.total() + 0.5)
    uniform = sc.prune(model, sparsity=0.6, allocation="uniform", solver="sparsegpt", data=[x])
    errors = [sum(r.error for r in run.report.layers) for run in (result, uniform)]
    assert errors[0] < 1.05 * errors[1]
    plan = sc.plan(model, sparsity=0.6, allocation="dynamic", data=[x])
    assert {p.name: p.kept for p in plan.layers} == {p.name: p.kept for p in result.plan.layers}
    mixed = sc.prune(model, sparsity=0.5, pattern="n:4", allocation="dynamic", solver="sparsegpt", data=[x])
    assert mixed.masks.density() <= 0.5
    for mask in mixed.masks.values():
        assert len(mask.reshape(-1, 4).sum(1).unique()) == 1, "one n for the whole layer"


def test_owl_by_hand():
    """Shares of scores above twice the mean: 1/8 and 2/8 and none; stretched to [0, 0.2] they differ by 0.1 each."""
    scores = {"one": [8.0, 1, 1, 1, 1, 1, 1, 1], "two": [8.0, 8, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "none": [1.0] * 8}

    def made(name):
        values = torch.tensor(scores[name] * 100)[None]
        return UnitScores(name, values.shape, 1, 800, 1, lambda: values)

    counts = ALLOCATIONS["owl"].make({n: made(n) for n in scores}, 0.5, spread=0.1, outlier=2.0)
    assert [int(counts[n]) for n in ("one", "two", "none")] == [400, 480, 320]
    with pytest.raises(RecipeError, match="owl"):
        ALLOCATIONS["owl"].make({"one": made("one")}, 0.5, spread=0.9)
