"""Network Slimming: the penalty, what it does to scales, and the whole of it end to end."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.demo import digits
from secateur.errors import RecipeError, TrainingError
from secateur.train.slimming import slimming_penalty


def network() -> nn.Sequential:
    torch.manual_seed(0)
    stem = [nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10))


def test_the_penalty_is_the_sum_of_absolute_scales_and_pulls_by_their_sign():
    model = network()
    with torch.no_grad():
        model[1].weight[:12] = -2
    penalty = slimming_penalty(model, 0.1)
    assert penalty.item() == pytest.approx(0.1 * (12 * 2 + 12))
    penalty.backward()
    assert torch.equal(model[1].weight.grad, 0.1 * model[1].weight.sign())
    with pytest.raises(TrainingError, match="BatchNorm"):
        slimming_penalty(nn.Linear(2, 2))


def test_training_drives_scales_to_zero():
    train = digits("train")
    below = {}
    for strength in (0.0, 3e-2):
        model = network()
        sc.finetune(model, train, epochs=8, optimizer="sgd", lr=0.2, slimming=strength)
        below[strength] = int((model[1].weight.abs() < 0.02).sum())
    assert below[0.0] == 0
    assert below[3e-2] >= 8
    with pytest.raises(RecipeError, match="slimming"):
        sc.finetune(network(), train, slimming=-1.0)


def test_a_recipe_trains_cuts_by_percentile_and_leaves_the_model_alone(tmp_path):
    model, train = network(), digits("train")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    keys = {"pattern": "channel", "criterion": "bn_scale", "allocation": "global", "sparsity": 1 / 3, "data": train}
    slimming = {"epochs": 3, "strength": 1e-2, "lr": 0.1}
    result = sc.prune(model, slimming=slimming, out=tmp_path / "run", **keys)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert result.model[0].out_channels == 16
    trained = network()
    sc.finetune(trained, train, epochs=3, optimizer="sgd", lr=0.1, slimming=1e-2)
    kept = next(c.kept for c in result.plan.cuts if c.tensor == "0.weight")
    assert list(kept) == sorted(trained[1].weight.abs().argsort(descending=True)[:16].tolist())
    assert torch.equal(result.model[0].weight, trained[0].weight[list(kept)])
    with pytest.raises(RecipeError, match="cut units"):
        sc.prune(model, sparsity=0.5, slimming=slimming, data=train)
    with pytest.raises(RecipeError, match="train="):
        sc.prune(model, pattern="channel", sparsity=0.5, slimming=slimming, example=torch.zeros(1, 1, 8, 8))


def test_the_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "network_slimming.py"))
    lines = capsys.readouterr().out.splitlines()
    assert int(lines[0].split("%")[0]) >= 20
    accuracy = float(lines[1].split("-> ")[1].rstrip("%"))
    assert accuracy > 93
