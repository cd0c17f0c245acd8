"""Shared weights in training: the gradients of a cluster are summed, equal weights stay equal, zeros stay zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import TrainingError, UnknownName
from secateur.train.tie import tie


def shared_layer(seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(6, 5)
    values = torch.tensor([0.0, 0.3, -0.7])
    layer.weight.data = values[torch.randint(0, 3, (5, 6))]
    return layer


def test_a_step_of_sgd_is_a_step_of_the_codebook():
    layer, x, y = shared_layer(), torch.randn(20, 6), torch.randn(20, 5)
    codes = torch.where(layer.weight == 0, 0, torch.where(layer.weight > 0, 1, 2))
    book = torch.tensor([0.3, -0.7], requires_grad=True)
    weight = torch.cat([torch.zeros(1), book])[codes]
    ((x @ weight.T + layer.bias.detach() - y) ** 2).sum().backward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    with tie(optimizer, layer, ["weight"]):
        ((layer(x) - y) ** 2).sum().backward()
        optimizer.step()
    expected = torch.cat([torch.zeros(1), book.detach() - 0.01 * book.grad])[codes]
    assert torch.allclose(layer.weight, expected, atol=1e-6)
    assert torch.equal(layer.weight == 0, codes == 0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_finetune_keeps_clusters(optimizer):
    layer = shared_layer()
    zero = layer.weight == 0
    batches = [(torch.randn(16, 6), torch.randint(0, 5, (16,))) for _ in range(8)]
    sc.finetune(layer, batches, shared=["weight"], optimizer=optimizer, lr=0.05, weight_decay=0.01, epochs=2)
    assert len(layer.weight.unique()) == 3
    assert torch.equal(layer.weight == 0, zero)
    assert 0.3 not in layer.weight.unique()


def test_what_is_not_shared_or_not_there_is_refused():
    layer = nn.Linear(100, 100)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(TrainingError, match="different values, more than 4096"):
        tie(optimizer, layer, ["weight"])
    with pytest.raises(UnknownName, match="Did you mean 'weight'"):
        tie(optimizer, layer, ["weigt"])
