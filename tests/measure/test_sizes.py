from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.errors import ModelError
from secateur.measure.sizes import nonzeros, sizes


def test_a_small_network_by_hand():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias.zero_()
        model[2].weight.fill_(1.0)
    got = sizes(model)
    assert got.parameters == 12 + 3 + 3 + 3 + 6
    assert got.nonzeros == 8 + 0 + 3 + 0 + 6
    assert got.bytes_memory == 4 * 27 + 4 * 6 + 8  # two running statistics in float32, one int64 count
    assert [(x.name, x.parameters, x.nonzeros) for x in got.layers[:2]] == [("0.weight", 12, 8), ("0.bias", 3, 0)]


def test_tied_parameters_count_once():
    model = nn.Module()
    model.embed = nn.Embedding(10, 4)
    model.head = nn.Linear(4, 10, bias=False)
    model.head.weight = model.embed.weight
    got = sizes(model)
    assert (got.parameters, got.bytes_memory) == (40, 160)
    assert [x.name for x in got.layers] == ["embed.weight"]


def test_a_slice_costs_the_memory_it_keeps_alive():
    model = nn.Linear(4, 2, bias=False)
    model.weight = nn.Parameter(torch.zeros(100, 4)[:2])
    assert sizes(model).bytes_memory == 1600
    assert sizes(model).parameters == 8


def test_half_precision_and_negative_zero():
    model = nn.Linear(4, 2, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight[:] = -0.0
    assert sizes(model).bytes_memory == 16
    assert sizes(model).nonzeros == 0


def test_sparse_tensors_count_what_they_store():
    index, values = torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0])
    module = nn.Module()
    module.register_buffer("csr", torch.sparse_csr_tensor(index, torch.tensor([1, 2]), values.clone(), (2, 3)))
    assert nonzeros(module.csr) == 2
    assert sizes(module).bytes_memory == 3 * 8 + 2 * 8 + 2 * 4
    module.register_buffer("csc", torch.sparse_csc_tensor(index, torch.tensor([0, 1]), values.clone(), (2, 2)))
    assert sizes(module).bytes_memory == 48 + 16 + 8  # the pointers are shared
    module.register_buffer("coo", torch.sparse_coo_tensor(torch.tensor([[0, 0], [1, 1]]), values.clone(), (2, 3)))
    assert nonzeros(module.coo) == 1
    assert sizes(module).bytes_memory == 72 + 4 * 8 + 2 * 4


def test_parameters_without_values_are_refused():
    with pytest.raises(ModelError, match="'weight' has no values"):
        sizes(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ModelError, match="has no values"):
        sizes(nn.LazyLinear(2))


def test_nan_is_not_zero_and_an_empty_model_is_nothing():
    assert nonzeros(torch.tensor([float("nan"), 0.0, 1.0])) == 2
    assert sizes(nn.ReLU()).bytes_memory == 0
