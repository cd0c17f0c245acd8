"""What every dynamic method promises: one suite for all of them, each on a small model of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamic_cases import CASES, outputs

import secateur as sc
from secateur.dynamic import DYNAMIC, Dynamic
from secateur.errors import ArtifactError, DataError, ModelError, RecipeError, UnknownName


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def gated(case):
    model = case.model()
    before = copy.deepcopy(model.state_dict())
    found = sc.dynamic(model, method=case.method, data=case.data(), budget=0.6, **case.options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model given was changed"
    return found


def test_every_method_has_a_case():
    assert {case.method for case in CASES.values()} == set(DYNAMIC)


def test_at_budget_one_it_is_the_dense_model(case, gated):
    found = copy.deepcopy(gated)
    found.budget = 1.0
    for batch in case.data():
        torch.testing.assert_close(outputs(found, batch), outputs(case.model(), batch), rtol=1e-4, atol=1e-5)


def test_members_of_a_batch_get_what_they_would_get_alone(case, gated):
    for batch in case.data():
        together = outputs(gated, batch)
        alone = torch.cat([outputs(gated, one) for one in case.split(batch)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_budget_bounds_the_cost_and_less_budget_costs_less(case, gated):
    found, means = copy.deepcopy(gated), []
    for budget in (1.0, 0.7, 0.4):
        found.budget = budget
        with found.recording() as costs:
            for batch in case.data():
                outputs(found, batch)
        assert len(costs) == sum(len(case.split(batch)) for batch in case.data())
        assert bool((costs.shares > 0).all())
        assert costs.mean <= budget + case.slack
        assert len(costs.quantiles()) == 5
        means.append(costs.mean)
    assert means[0] >= means[1] >= means[2]
    assert means[2] < means[0]


def test_costs_are_recorded_inside_the_block_only(case, gated):
    with gated.recording() as costs:
        assert str(costs) == "no inputs yet"
    outputs(gated, case.data()[0])
    assert len(costs) == 0


def test_saved_and_loaded_it_is_the_same(case, gated, tmp_path):
    sc.save(gated, tmp_path / "gated")
    again = sc.load(tmp_path / "gated", model=case.model())
    assert isinstance(again, Dynamic)
    assert again.budget == gated.budget
    assert again.facts == gated.facts
    for budget in (0.6, 0.3):
        gated_then, again.budget = copy.deepcopy(gated), budget
        gated_then.budget = budget
        for batch in case.data():
            assert torch.equal(outputs(again, batch), outputs(gated_then, batch))


def test_another_model_does_not_take_the_gates(case, gated, tmp_path):
    sc.save(gated, tmp_path / "gated")
    with pytest.raises(ArtifactError):
        sc.load(tmp_path / "gated", model=torch.nn.Linear(3, 3))


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, float("nan"), True, "half"])
def test_a_budget_out_of_range_is_refused_and_changes_nothing(case, gated, budget):
    with pytest.raises(RecipeError, match="budget"):
        sc.dynamic(case.model(), method=case.method, data=case.data(), budget=budget, **case.options)
    before = gated.budget
    with pytest.raises(RecipeError, match="out of range"):
        gated.budget = budget
    assert gated.budget == before


def test_unknown_options_missing_data_and_models_without_parts_are_refused(case, gated):
    with pytest.raises(RecipeError, match="no option"):
        sc.dynamic(case.model(), method=case.method, data=case.data(), sparsness=3)
    with pytest.raises(DataError):
        sc.dynamic(case.model(), method=case.method, data=[])
    with pytest.raises(ModelError):
        sc.dynamic(torch.nn.Identity(), method=case.method, data=case.data(), **case.options)
    with pytest.raises(ModelError, match="gates already"):
        sc.dynamic(gated, method=case.method, data=case.data(), **case.options)


def test_an_unknown_method_is_refused():
    with pytest.raises(UnknownName, match="teal"):
        sc.dynamic(torch.nn.Linear(2, 2), method="teel", data=[torch.ones(1, 2)])


def test_what_was_pruned_stays_pruned(case):
    model = case.model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter[::2] = 0
    found = sc.dynamic(model, method=case.method, data=case.data(), budget=0.5, **case.options)
    zeros = {tuple(p.shape): int((p == 0).sum()) for p in model.parameters() if p.dim() >= 2}
    for parameter in found.parameters():
        if tuple(parameter.shape) in zeros and parameter.dim() >= 2:
            assert int((parameter == 0).sum()) >= zeros[tuple(parameter.shape)] > 0
    found.budget = 1.0
    batch = case.data()[0]
    torch.testing.assert_close(outputs(found, batch), outputs(model, batch), rtol=1e-4, atol=1e-5)
