"""Whatever is wrong with calibration data is named, repaired or refused; it never becomes a silent identity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import DataError, LayerError, NonFiniteError

SOLVERS = ["sparsegpt", "alps", "admm", "least-squares", "obc"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden):
        return hidden + self.down(self.up(hidden).relu())


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(12, 8), nn.ModuleList([Block() for _ in range(3)])

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def prune(model, data, solver="sparsegpt", **options):
    return sc.prune(model, sparsity=0.5, allocation="uniform", solver=solver, data=data, **options)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_token_gives_matrices_of_rank_one(solver):
    result = prune(Network(), [{"input_ids": torch.tensor([[3]])}], solver)
    assert result.masks.sparsity() == 0.5
    assert all(p.isfinite().all() for p in result.model.parameters())
    assert all(layer.error is not None and layer.error < 1 for layer in result.report.layers)


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_padding_is_refused_before_any_work(solver):
    data = [{"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.zeros(2, 5, dtype=torch.long)}]
    with pytest.raises(DataError, match="batch 0 of the data is all padding"):
        prune(Network(), data, solver)


@pytest.mark.parametrize("solver", SOLVERS)
def test_dead_inputs_are_counted_and_their_weights_go(solver):
    model = Network()
    with torch.no_grad():
        model.blocks[1].up.weight[:4], model.blocks[1].up.bias[:4] = 0, -1
    result = prune(model, [{"input_ids": torch.randint(12, (4, 9))}], solver, layers=["blocks.1.down"])
    dead = next(int(n.split()[0]) for n in result.report.notes if "always zero" in n)
    assert dead >= 4
    if solver != "least-squares":  # which takes the criterion's mask
        assert not result.masks["blocks.1.down.weight"][:, :4].any()


def test_nan_activations_name_the_module():
    model = Network()
    with torch.no_grad():
        model.blocks[1].up.bias[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"blocks\.1\.up.*1 of|blocks\.1\.up.* NaN"):
        prune(model, [{"input_ids": torch.randint(12, (1, 4))}])


def test_a_layer_that_no_sample_reaches_is_named():
    class Routed(Network):
        def forward(self, input_ids, attention_mask=None):
            return self.blocks[0](self.embed(input_ids))

    with pytest.raises(LayerError, match=r"blocks\.1\.up"):
        prune(Routed(), [{"input_ids": torch.randint(12, (1, 4))}])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("pattern", ["element", "2:4"])
def test_ties_are_cut_by_exact_count(solver, pattern):
    model = Network()
    with torch.no_grad():
        for block in model.blocks:
            block.up.weight.fill_(0.5)
            block.down.weight.fill_(-0.5)
    options = {"pattern": pattern, "solver": solver, "data": [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]}
    result = sc.prune(model, **options) if pattern == "2:4" else sc.prune(model, sparsity=0.5, allocation="uniform", **options)
    assert all(layer.kept == layer.parameters // 2 for layer in result.report.layers)
    assert result.masks.sparsity() == 0.5


def test_float16_sums_do_not_overflow_and_weights_that_would_are_refused():
    model = Network().half()
    with torch.no_grad():
        model.embed.weight.mul_(200)
    result = prune(model, [{"input_ids": torch.randint(12, (8, 64))}])
    assert all(p.dtype == torch.float16 and p.isfinite().all() for p in result.model.parameters())
    layer = nn.Linear(2, 1, bias=False).half()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[6e4, 5e4]]))
    x = torch.tensor([[1.0, 1.0], [1.01, 1.0]]).half() / 100
    with pytest.raises(NonFiniteError, match=r"the repaired weight 'weight'.*infinite"):
        sc.prune(layer, sparsity=0.5, solver={"name": "sparsegpt", "damp": 1e-6}, data=[x])


def test_no_data_at_all_is_refused():
    with pytest.raises(DataError, match="no batches"):
        prune(Network(), [])
