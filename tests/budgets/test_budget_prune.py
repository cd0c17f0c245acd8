"""Budgets through `sc.prune`, `sc.plan` and recipes: promised, achieved, refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import BudgetError, LayerError, RecipeError
from secateur.measure.macs import macs
from secateur.measure.sizes import sizes
from secateur.recipe import Recipe
from secateur.types import Plan, Report


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 5)
    ).eval()


@pytest.fixture
def example() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("allocation", [None, "global", "isomorphic", "gain"])
@pytest.mark.parametrize(("budget", "found"), [
    ("60% MACs", lambda m, x: macs(m, x).dense),
    ("900 params", lambda m, x: sizes(m).parameters),
    ("3 kB", lambda m, x: sizes(m).bytes_memory),
])  # fmt: skip
def test_the_cut_model_has_what_plan_and_report_promise(model, example, budget, found, allocation):
    plan = sc.plan(model, pattern="channel", budget=budget, allocation=allocation, example=example)
    result = sc.prune(model, pattern="channel", budget=budget, allocation=allocation, example=example)
    outcome = result.report.budget
    assert outcome.promised == outcome.achieved == found(result.model, example) == plan.budget.promised
    assert outcome.achieved <= outcome.limit < outcome.dense == found(model, example)
    assert plan.cuts == result.plan.cuts
    assert plan.budget.achieved is None
    assert any(note.startswith(f"budget {budget}: at most") for note in result.report.notes)
    assert Report.from_json(result.report.to_json()).budget == outcome
    assert Plan.from_json(result.plan.to_json()) == result.plan


@pytest.mark.parametrize("allocation", [None, "uniform", "erk", "lamp"])
@pytest.mark.parametrize(("pattern", "budget"), [
    ("element", "30% params"), ("element", "400 params"), ("element", "25% MACs"), ("row", "40% MACs"), ("4x1", "50% params"),
    ("neuron", "50% params"), ("neuron", "60% MACs"),
])  # fmt: skip
def test_masks_keep_to_nonzero_parameters_and_their_multiply_adds(model, example, pattern, budget, allocation):
    result = sc.prune(model, pattern=pattern, budget=budget, allocation=allocation, example=example)
    outcome = result.report.budget
    assert outcome.promised == outcome.achieved <= outcome.limit
    real = sizes(result.model).nonzeros if "params" in budget else macs(result.model, example).nonzero
    assert real == outcome.achieved
    if pattern == "element":  # as close as single weights come
        assert outcome.limit - real <= (1 if "params" in budget else 2 * 6 * 6 + 7)
    assert sc.plan(model, pattern=pattern, budget=budget, allocation=allocation, example=example).budget.promised == real


@pytest.mark.parametrize(("keys", "words"), [
    ({"pattern": "element", "budget": "5 ms"}, "take as much memory and time"),
    ({"pattern": "element", "budget": "1 kB"}, "patterns that cut units"),
    ({"pattern": "2:4", "budget": "50% params"}, "removes exactly 0.5"),
    ({"pattern": "channel", "budget": "50% MACs", "sparsity": 0.5}, "give one of them"),
    ({"pattern": "channel", "budget": "lots"}, "is not understood"),
    ({"pattern": "channel"}, "or a budget"),
    ({"pattern": "channel", "sparsity": 0.5, "allocation": "gain"}, "give a budget"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused_before_any_work(model, example, keys, words):
    with pytest.raises(RecipeError, match=words):
        sc.prune(model, example=example, **keys)


def test_macs_need_an_example_and_gradual_pruning_knows_no_budget(model):
    with pytest.raises(RecipeError, match="pass example="):
        sc.prune(model, budget="50% MACs")
    with pytest.raises(RecipeError, match="budget belong"):
        sc.gradual(model, torch.optim.SGD(model.parameters(), lr=0.1), budget="50% params", end=10, every=1)


def test_budgets_out_of_reach_say_the_nearest(model, example):
    with pytest.raises(BudgetError, match="nearest that can is") as caught:
        sc.prune(model, pattern="channel", budget="1% MACs", example=example)
    nearest = caught.value.nearest
    assert sc.plan(model, pattern="channel", budget=f"{nearest} MACs", example=example).budget.promised == nearest
    with pytest.raises(BudgetError, match="does not prune"):
        sc.prune(model, budget="10 params", example=example)


def test_a_recipe_file_carries_a_budget(tmp_path):
    recipe = Recipe.make({"budget": " 50% MACs ", "pattern": "channel"})
    assert recipe.budget == "50% MACs"
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    assert Recipe.make(tmp_path / "r.toml") == recipe


def test_a_sparsity_that_empties_a_layer_is_refused_by_name(model, example):
    with pytest.raises(LayerError, match=r"sparsity=0\.95 would leave nothing of '0\.weight' \(8 units\)"):
        sc.prune(model, pattern="channel", sparsity=0.95, example=example)
    at_least = sc.prune(model, pattern={"name": "channel", "min_width": 2}, sparsity=0.95, example=example).model
    assert (at_least[0].out_channels, at_least[3].out_channels) == (2, 2)
    assert sc.plan(model, pattern="channel", sparsity=0.93, example=example).sparsity > 0.9


def test_milliseconds_are_chosen_by_gain_and_reported_with_their_spread(model, example):
    """A budget so generous that nothing is cut: no time that was measured decides over this test."""
    result = sc.prune(model, pattern="channel", budget="1000000 ms", example=example)
    outcome = result.report.budget
    assert outcome.low <= outcome.achieved <= outcome.high
    assert not result.plan.cuts
    assert any("quartiles" in note for note in result.report.notes)


def test_units_that_are_forced_go_under_a_budget_and_do_not_come_back(model, example):
    for allocation in ("uniform", "global", "gain"):
        keys = {"pattern": "channel", "allocation": allocation, "force": ("0[2,5]",), "example": example}
        plan = sc.plan(model, budget="60% MACs", **keys)
        kept = next(c.kept for c in plan.cuts if (c.tensor, c.dim) == ("0.weight", 0))
        assert not {2, 5} & set(kept)
        assert plan.budget.promised <= plan.budget.limit
