"""Sparse variational dropout against its definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from train.resumable import digits

import secateur as sc
from secateur.errors import LayerError
from secateur.train.variational import Variational, _divergence

LAYERS = {
    "linear": (nn.Linear(6, 4), (2, 6)),
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 7, 7)),
    "circular": (nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular", dilation=2), (2, 3, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_have_the_mean_and_variance_that_noisy_weights_would_give(kind):
    layer, shape = LAYERS[kind]
    torch.manual_seed(0)
    x = torch.randn(shape)
    with Variational(layer) as noise:
        deviation = torch.rand_like(layer.weight) * 0.3
        noise.load_state_dict({"weight": 2 * deviation.log()})
        layer.train()
        drawn = torch.stack([layer(x) for _ in range(4000)])
        plain = layer.eval()(x)
    weights = [layer.weight + deviation * torch.randn_like(deviation) for _ in range(4000)]
    direct = torch.stack([torch.func.functional_call(layer, {"weight": w}, (x,)) for w in weights])
    torch.testing.assert_close(plain, torch.func.functional_call(layer, {}, (x,)))
    scale = direct.var(0).sqrt().max()
    assert (drawn.mean(0) - plain).abs().max() < 0.1 * scale
    assert (drawn.var(0).sqrt() / direct.var(0).sqrt() - 1).abs().max() < 0.1


def test_divergence_is_the_integral_up_to_the_error_of_the_approximation():
    def exact(log_alpha):
        """KL of N(1, alpha) from the log-uniform prior, up to a constant: E log|e| - log(alpha) / 2."""
        alpha = math.exp(log_alpha)
        e = np.linspace(1 - 12 * math.sqrt(alpha), 1 + 12 * math.sqrt(alpha), 2_000_001) + 1e-9
        density = np.exp(-((e - 1) ** 2) / (2 * alpha)) / math.sqrt(2 * math.pi * alpha)
        return float(np.sum(density * np.log(np.abs(e))) * (e[1] - e[0])) - 0.5 * log_alpha

    points = [-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 3.0, 9.0]
    found = [_divergence(torch.tensor(p)).item() for p in points]
    wanted = [exact(p) for p in points]
    shift = wanted[-1] - found[-1]
    assert max(abs(w - f - shift) for w, f in zip(wanted, found, strict=True)) < 0.03
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.001


def test_training_finds_a_sparse_network_that_still_classifies():
    train, [(x, y)] = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    sc.finetune(model, train, epochs=10, lr=0.01)
    samples = sum(len(labels) for _, labels in train)
    with Variational(model) as noise:
        optimizer = torch.optim.Adam([*model.parameters(), *noise.parameters()], lr=0.01)
        for epoch in range(80):
            for images, labels in train:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels) + min(1.0, epoch / 40) * noise.divergence() / samples
                loss.backward()
                optimizer.step()
    masks = noise.masks()
    masks.apply(model)
    assert masks.sparsity() > 0.8
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.9
    assert not model[0]._forward_hooks


def test_state_and_what_cannot_be():
    model = nn.Linear(4, 3)
    noise = Variational(model)
    noise.load_state_dict({"weight": torch.full((3, 4), 9.0)})
    assert noise.masks().kept() == 0
    assert torch.equal(noise.state_dict()["weight"], torch.full((3, 4), 9.0))
    assert noise.divergence().requires_grad
    with pytest.raises(LayerError, match="no linear or convolution layer"):
        Variational(nn.Sequential(nn.LSTM(3, 3)))
