"""MULTIFLOW against loops over single weights and the samples themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.criteria import CRITERIA
from secateur.data.batches import Batches
from secateur.job import prepare
from secateur.layers import find_layers
from secateur.selection import choose
from secateur.stats import collect
from secateur.types import Need


def multiflow(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    layers = find_layers(model)[0]
    stats = collect(model, layers, {Need.INPUT_NORM}, batches=Batches([x])).layers
    return CRITERIA["multiflow"].make(stats[next(iter(layers))])


def assert_proportional(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found / found.sum(), expected / expected.sum())


def test_a_linear_layer_by_brute_force():
    layer, x = nn.Linear(4, 3), torch.randn(7, 5, 4)
    w = layer.weight.detach()
    norm = [sum(float(x[b, t, j]) ** 2 for b in range(7) for t in range(5)) ** 0.5 for j in range(4)]
    expected = torch.zeros(3, 4)
    for i in range(3):
        into = sum(abs(float(w[i, j])) * norm[j] for j in range(4)) / 4
        for j in range(4):
            out_of = sum(abs(float(w[k, j])) * norm[j] for k in range(3)) / 3
            expected[i, j] = abs(float(w[i, j])) * into * out_of
    assert_proportional(multiflow(nn.Sequential(layer), x), expected)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_is_the_matrix_product_that_it_stands_for(groups):
    """Each group of a convolution is a linear layer on patches; the groups' flows do not mix."""
    conv, x = nn.Conv2d(4, 8, 3, groups=groups, bias=False), torch.randn(2, 4, 6, 6)
    found = multiflow(nn.Sequential(conv), x)
    patches = torch.nn.functional.unfold(x, 3).transpose(1, 2).reshape(-1, groups, 4 // groups * 9)
    expected = []
    for g, weight in enumerate(conv.weight.detach().flatten(1).abs().chunk(groups)):
        flow = weight * patches[:, g].norm(dim=0)
        expected.append(weight * flow.mean(1, keepdim=True) * flow.mean(0, keepdim=True))
    assert_proportional(found, torch.cat(expected).reshape(found.shape))


def test_queries_keys_and_values_are_three_matrices():
    attention, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(3, 5, 4)

    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = attention

        def forward(self, x):
            return self.inner(x, x, x)[0]

    w, norm = attention.in_proj_weight.detach().abs(), x.flatten(0, 1).norm(dim=0)
    parts = []
    for one in w.chunk(3):
        flow = one * norm
        parts.append(one * flow.mean(1, keepdim=True) * flow.mean(0, keepdim=True))
    assert_proportional(multiflow(SelfAttention(), x), torch.cat(parts))


def test_how_many_stay_is_by_magnitude_and_which_by_flow():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    data = [torch.randn(16, 6)]

    def masks(**recipe):
        job = prepare(model, sc.Recipe.make(sparsity=0.5, **recipe), data=data)
        return choose(job.layers, job.statistics(model).layers, sparsity=0.5, method=job.method)

    flow, magnitude = masks(criterion="multiflow", allocation="magnitude"), masks(criterion="magnitude", allocation="global")
    assert {n: int(m.sum()) for n, m in flow.items()} == {n: int(m.sum()) for n, m in magnitude.items()}
    assert flow.diff(magnitude)


def test_magnitudes_of_coarser_patterns_are_sums_and_what_is_gone_stays_gone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    data = [torch.randn(16, 8)]
    result = sc.prune(
        model,
        sparsity=0.5,
        criterion="multiflow",
        allocation="magnitude",
        pattern="4x1",
        schedule="iterative",
        steps=2,
        data=data,
    )
    assert result.masks.sparsity() == 0.5
    blocks = [m.reshape(2, 4, 8).any(1) for m in result.masks.values()]
    assert all(
        torch.equal(b[:, None].expand(2, 4, 8).reshape(8, 8), m) for b, m in zip(blocks, result.masks.values(), strict=True)
    )
