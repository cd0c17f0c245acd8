"""Layers that lost inputs, refitted: against brute-force least squares, and on a trained network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from resnet20 import images, trained
from torch import nn

import secateur as sc
from secateur.data.batches import Batches
from secateur.errors import RecipeError
from secateur.repair_units import refit
from secateur.types import Cut, Plan

KEPT = (0, 2, 3)


def correlated(*shape: int, dim: int = 1) -> torch.Tensor:
    """Inputs with means and with channels that tell much of one another, as activations are."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(shape[dim], shape[dim], generator=generator)
    x = torch.randn(shape, generator=generator).transpose(dim, -1) @ mix + torch.randn(shape[dim], generator=generator)
    return x.transpose(dim, -1).contiguous()


def brute_force(rows: torch.Tensor, keep: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    """Least squares of the old outputs on the kept inputs, with an intercept where there is a bias. float64."""
    wanted = rows @ weight.T + (0 if bias is None else bias)
    design = rows[:, keep] if bias is None else torch.cat([rows[:, keep], torch.ones(len(rows), 1)], 1)
    solution = torch.from_numpy(np.linalg.lstsq(design.numpy(), wanted.detach().numpy(), rcond=None)[0]).T
    return (solution, None) if bias is None else (solution[:, :-1], solution[:, -1])


@pytest.fixture(autouse=True)
def undamped(monkeypatch):
    monkeypatch.setattr("secateur.repair_units.DAMP", 1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_the_least_squares_solution(bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4, bias=bias), correlated(200, 5)
    before = copy.deepcopy(layer.state_dict())
    plan = Plan(cuts=(Cut("weight", 1, KEPT), Cut("weight", 0, (1, 3)), *([Cut("bias", 0, (1, 3))] if bias else [])))
    found = refit(layer, plan, Batches([x[:64], x[64:]]))
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in before.items())
    weight, intercept = brute_force(
        x.double(), torch.tensor(KEPT), layer.weight.detach().double(), layer.bias.detach().double() if bias else None
    )
    torch.testing.assert_close(found.tensors["weight"].double(), weight[[1, 3]], rtol=1e-3, atol=1e-4)
    if bias:
        torch.testing.assert_close(found.tensors["bias"].double(), intercept[[1, 3]], rtol=1e-3, atol=1e-4)
    assert found.notes == ()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_is_the_least_squares_solution_of_its_patches(groups, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(5 * groups, 4, 3, padding=1, stride=2, groups=groups, bias=bias)
    x = correlated(30, 5 * groups, 8, 8)
    found = refit(conv, Plan(cuts=(Cut("weight", 1, KEPT),)), Batches([x]))
    keep = torch.tensor([c * 9 + k for c in KEPT for k in range(9)])
    for g in range(groups):
        part = slice(4 // groups * g, 4 // groups * (g + 1))
        patches = F.unfold(x[:, 5 * g : 5 * g + 5], 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 45).double()
        weight = conv.weight[part].detach().flatten(1).double()
        solution, intercept = brute_force(patches, keep, weight, conv.bias[part].detach().double() if bias else None)
        torch.testing.assert_close(found.tensors["weight"][part].flatten(1).double(), solution, rtol=1e-3, atol=1e-3)
        if bias:
            torch.testing.assert_close(found.tensors["bias"][part].double(), intercept, rtol=1e-3, atol=1e-3)


def test_bias_compensation_keeps_the_weights_and_the_mean_of_the_output():
    layer, x = nn.Linear(5, 4), correlated(100, 5)
    found = refit(layer, Plan(cuts=(Cut("weight", 1, KEPT),)), Batches([x]), bias_only=True)
    assert set(found.tensors) == {"bias"}
    outputs = F.linear(x[:, KEPT], layer.weight[:, KEPT], found.tensors["bias"])
    torch.testing.assert_close(outputs.mean(0), layer(x).mean(0), rtol=1e-4, atol=1e-4)
    plain = nn.Linear(5, 4, bias=False)
    found = refit(plain, Plan(cuts=(Cut("weight", 1, KEPT),)), Batches([x]), bias_only=True)
    assert found.tensors == {}
    assert "'weight'" in found.notes[0]


class Doubled(nn.Module):
    """Every hidden neuron is there twice, one ten times as large, so that half of them say all that there is to say."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.a.weight[4:], self.a.bias[4:] = self.a.weight[:4] * 10, self.a.bias[:4] * 10

    def forward(self, x):
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_redundant_is_cut_without_loss(inplace):
    torch.manual_seed(1)
    model, x = Doubled(), torch.randn(100, 6)
    wanted = model(x).detach()
    keys = {"pattern": "channel", "sparsity": 0.5, "data": [x]}
    assert (sc.prune(model, **keys).model(x) - wanted).abs().max() > 0.05
    smaller = sc.prune(model, repair="least-squares", inplace=inplace, **keys).model
    assert (smaller is model) == inplace
    assert smaller.a.out_features == 4
    torch.testing.assert_close(smaller(x), wanted, rtol=1e-3, atol=1e-3)


def test_repair_that_cannot_be_is_refused():
    with pytest.raises(RecipeError, match="pass data="):
        sc.prune(Doubled(), pattern="channel", sparsity=0.5, example=torch.randn(2, 6), repair="bias")
    with pytest.raises(RecipeError, match="cut units"):
        sc.prune(Doubled(), sparsity=0.5, data=[torch.randn(2, 6)], repair="least-squares")
    with pytest.raises(RecipeError, match="repair"):
        sc.prune(Doubled(), pattern="channel", sparsity=0.5, data=[torch.randn(2, 6)], repair="lstsq")


def test_resnet20_is_better_for_it():
    model = trained()
    x, y = images("test", range(0, 10000, 25))
    c, labels = images("train", range(0, 50000, 200))
    data = [(c[i::2], labels[i::2]) for i in range(2)]  # the images are in the order of their classes

    def accuracy(**changes) -> float:
        result = sc.prune(
            model, pattern="channel", sparsity=0.5, layers=["layer*.conv1"], ignore=["conv1"], data=data,
            reestimate_norms=True, **changes,
        )  # fmt: skip
        with torch.inference_mode():
            return float((result.model.eval()(x).argmax(1) == y).float().mean())

    assert accuracy(repair="least-squares") > accuracy() + 0.1
