"""Sensitivity of groups of units, what the curves propose, and the allocation that goes by them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import LayerError, RecipeError
from secateur.graph import choose_groups, cut, make_plan, select, trace, unit_scores
from secateur.measure.sensitivity import damages, propose
from secateur.select import removed_count
from secateur.types import Sensitivity


def network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 4)).eval()


EXAMPLE = torch.linspace(-1, 1, 12).reshape(2, 6)


def close_to_dense(dense: nn.Module):
    """Quality 1 for the dense model's outputs, less the further from them."""
    wanted = dense(EXAMPLE).detach()
    return lambda m: 1.0 - float((m(EXAMPLE).detach() - wanted).norm() / wanted.norm())


def test_each_point_cuts_one_group_and_nothing_else():
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sizes = []

    def evaluate(m):
        sizes.append((m[0].out_features, m[2].out_features))
        return close_to_dense(model)(m)

    curves = sc.scan(model, evaluate=evaluate, pattern="channel", sparsities=[0.25, 0.5], example=EXAMPLE)
    assert sizes == [(8, 10), (6, 10), (4, 10), (8, 7), (8, 5)]
    assert [c.layer for c in curves] == ["0.weight", "2.weight"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    graph = trace(model, EXAMPLE)
    groups = choose_groups(graph, ("neuron",))
    scores = unit_scores(model, groups, "l1")
    for curve, group in zip(curves, groups, strict=True):
        for sparsity, quality in zip(curve.sparsity, curve.quality, strict=True):
            alone = cut(model, make_plan(graph, model, select(graph, [group], scores, sparsity)))
            assert quality == close_to_dense(model)(alone)


def test_a_scan_of_units_is_cached_like_any_other(tmp_path):
    model, calls = network(), []

    def evaluate(m):
        calls.append(m)
        return close_to_dense(model)(m)

    keys = {"evaluate": evaluate, "pattern": "channel", "sparsities": [0.5], "example": EXAMPLE, "cache": tmp_path}
    first = sc.scan(model, **keys)
    assert len(calls) == 3
    assert sc.scan(model, **keys) == first
    assert len(calls) == 4, "the dense model is evaluated again, nothing else"
    sc.scan(model, **{**keys, "pattern": {"name": "channel", "round_to": 2}})
    assert len(calls) == 7, "another pattern is another scan"


def test_damage_is_monotone_interpolated_and_the_same_for_losses():
    up = Sensitivity("a", (0.0, 0.2, 0.4, 0.6), (0.9, 0.95, 0.7, 0.75))
    curve = damages([up])["a"]
    assert curve.lost == pytest.approx((0.0, 0.0, 0.2, 0.2))
    assert [curve.at(s) for s in (0.0, 0.1, 0.3, 0.4, 0.5, 0.9)] == pytest.approx([0, 0, 0.1, 0.2, 0.2, 0.2])
    assert curve.bears(0.1) == pytest.approx(0.3)
    assert curve.bears(1.0) == 0.6
    down = Sensitivity("a", up.sparsity, tuple(-q for q in up.quality))
    assert damages([down])["a"] == curve, "a loss that rises is a quality that falls"


def test_the_proposal_takes_each_layer_to_the_same_damage():
    curves = [
        Sensitivity("weak", (0.0, 0.5), (1.0, 0.8)),
        Sensitivity("strong", (0.0, 0.5, 0.9), (1.0, 0.995, 0.98)),
        Sensitivity("steel", (0.0, 0.5, 0.9), (1.0, 1.0, 1.0)),
    ]
    assert propose(curves, loss=0.01) == pytest.approx({"weak": 0.025, "strong": 0.6333, "steel": 0.9})


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
def test_the_allocation_goes_by_the_curves(sparsity):
    """Against brute force over all widths: as many units go as asked, and no choice has a smaller worst damage."""
    model = network()
    curves = sc.scan(model, evaluate=close_to_dense(model), pattern="channel", example=EXAMPLE)
    keys = {"pattern": "channel", "allocation": "sensitivity", "sensitivity": curves, "example": EXAMPLE}
    plan = sc.plan(model, sparsity=sparsity, **keys)
    kept = {g.members[0].removesuffix(":0"): (g.units, g.kept) for g in plan.groups if g.reason is None}
    gone = removed_count(18, sparsity)
    assert sum(units - left for units, left in kept.values()) == gone
    found = damages(curves)

    def worst(removed: dict[str, int]) -> float:
        return max(found[n].at(r / kept[n][0]) for n, r in removed.items() if r)

    choices = [
        dict(zip(kept, r, strict=True)) for r in itertools.product(*(range(u) for u, _ in kept.values())) if sum(r) == gone
    ]
    assert worst({n: u - left for n, (u, left) in kept.items()}) == pytest.approx(min(map(worst, choices)))
    result = sc.prune(model, budget="50% MACs", **keys)
    assert result.report.budget.achieved == result.report.budget.promised <= result.report.budget.limit
    assert result.report.sensitivity == curves


def test_curves_that_are_missing_are_said():
    model = network()
    with pytest.raises(LayerError, match="nothing to take out"):
        sc.scan(model, evaluate=close_to_dense(model), pattern="layer", example=EXAMPLE)
    with pytest.raises(RecipeError, match="pass sensitivity="):
        sc.plan(model, pattern="channel", sparsity=0.5, allocation="sensitivity", example=EXAMPLE)
    other = [Sensitivity("0.weight", (0.0, 0.5), (1.0, 0.5))]
    with pytest.raises(RecipeError, match=r"no sensitivity curve of '2\.weight' \(1 of 2 groups"):
        sc.plan(model, pattern="channel", sparsity=0.5, allocation="sensitivity", sensitivity=other, example=EXAMPLE)
