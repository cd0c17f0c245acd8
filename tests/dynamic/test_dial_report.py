"""The report of a model with gates: what it says of the dial, that it comes back from JSON, and what the page shows."""

from __future__ import annotations

import json

import pytest
import torch
from dynamic_cases import convolutional, outputs, pictures

import secateur as sc
from secateur.errors import RecipeError
from secateur.report.dial import chosen
from secateur.report.html import render
from secateur.types import Report


def accuracy(model):
    return {"accuracy": sum(float((outputs(model, b).argmax(1) == b[1]).float().mean()) for b in pictures()) / 3}


@pytest.fixture(scope="module")
def gated():
    return sc.dynamic(convolutional(), method="skip", data=pictures(), budget=0.7, samples=24)


@pytest.fixture(scope="module")
def report(gated):
    return gated.report(accuracy, budgets=(0.9, 0.5, 1e-6))


def test_it_has_a_point_for_every_budget_that_can_be_met(gated, report):
    assert [p.budget for p in report.dial] == [1.0, 0.9, 0.7, 0.5]
    assert len(report.notes) == 1
    assert "cannot be met" in report.notes[0]
    assert gated.budget == 0.7
    for point in report.dial:
        gated.budget = point.budget
        with gated.recording() as costs:
            assert accuracy(gated)["accuracy"] == point.quality
        assert costs.mean == point.cost
        assert sum(point.counts) == 24
        low, high = torch.aminmax(costs.shares)
        used = [i for i, count in enumerate(point.counts) if count]
        assert used[0] == min(int(low * 20), 19)
        assert used[-1] == min(int(high * 20), 19)
    gated.budget = 0.7
    assert report.before.quality == accuracy(convolutional())


def test_it_comes_back_from_json_and_from_an_artifact(gated, report, tmp_path):
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    sc.save(gated, tmp_path / "gated", report=report)
    assert json.loads((tmp_path / "gated" / "report.json").read_text())["dial"][0]["budget"] == 1.0


def test_the_page_shows_the_curve_the_spread_and_the_table(report):
    page = render(report)
    assert 'id="dial"' in page
    own = report.dial[2]
    assert (own.budget, own.own) == (0.7, True)
    assert f"{100 * own.cost:.1f}% of the gated multiply-adds are computed on average, within a budget of 70.0%" in page
    assert "weights are gone" not in page
    assert page.count("<svg") == 2
    for point in report.dial:
        assert f"{100 * point.budget:.1f}%" in page
    assert [p.budget for p in chosen(report.dial)] == [0.9, 0.7, 0.5]
    assert 'id="dial"' not in render(Report("none", report.before, report.after))


def test_an_evaluation_that_runs_no_model_is_refused(gated):
    with pytest.raises(RecipeError, match="did not run the model"):
        gated.report(lambda model: 0.5)
    assert gated.budget == 0.7
