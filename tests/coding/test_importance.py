"""Steps by what they do to the network's output: the importance against the Jacobian, and what a budget wins by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.coding import compress as compressing
from secateur.coding.importance import coarseness, output_importance
from secateur.errors import RecipeError
from secateur.layers import find_layers


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=24), nn.ReLU(), nn.Conv2d(24, 48, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    with torch.no_grad():
        model[8].weight[:32] *= 0.05  # half of the neurons hardly matter
    return model


def test_importance_is_the_mean_squared_jacobian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(3, 5)
    batches = [x[:2], x[2:]]
    found = [output_importance(model, find_layers(model)[0], batches, seed=s)["0.weight"] for s in range(150)]
    hidden = model[0](x).detach()
    jacobian = torch.stack([torch.func.jacrev(lambda h: model[2](model[1](h)))(h) for h in hidden])  # [sample, out, hidden]
    wanted = (jacobian.square().sum(1) / model(x).detach().square().sum(1, keepdim=True)).mean(0)
    torch.testing.assert_close(torch.stack(found).mean(0), wanted, rtol=0.25, atol=0.0)


def test_the_model_is_left_as_it_was_and_frozen_weights_are_no_hindrance():
    model = network().requires_grad_(False).train()
    found = output_importance(model, find_layers(model)[0], [torch.randn(2, 3, 9, 9)])
    assert list(found) == list(find_layers(model)[0])
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_steps_are_coarse_where_outputs_matter_little():
    weight, gram = torch.randn(3, 4), torch.eye(4)[None]
    steps = coarseness(weight, gram, torch.tensor([1.0, 4.0, 0.0]), "w")
    torch.testing.assert_close(steps[0] / steps[1], torch.tensor(2.0))
    torch.testing.assert_close(steps[2] / steps[0], (1.0 / (5 / 3 * torch.tensor(1e-3))).sqrt())


def test_a_budget_is_met_and_costs_the_output_less_than_layers_chosen_apart(monkeypatch):
    model = network()
    data = [torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    test = torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(9))
    model.requires_grad_(False)
    wanted = model(test)

    def run():
        found = sc.compress(model, scheme="entropy", budget=2600, data=data, vector_bits=None)
        spent = sum(layer.bytes for layer in found.layers if layer.bits is not None)
        return spent, float((found.model(test) - wanted).square().mean() / wanted.square().mean())

    spent, error = run()
    monkeypatch.setattr(compressing._Work, "steps", lambda *_: None)
    apart = run()
    assert 2600 * 0.97 < spent <= 2600
    assert error < 0.8 * apart[1]


def test_too_small_a_budget_is_refused():
    with pytest.raises(RecipeError, match="20 bytes are too few"):
        sc.compress(network(), scheme="entropy", budget=20, data=[torch.randn(4, 3, 9, 9)])
