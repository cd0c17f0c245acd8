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
from secateur.graph import cut
from secateur.repair_units import refit, write
from secateur.types import Cut, Plan

KEPT = (0, 2, 3)  #: of five inputs of a group
ROWS = (1, 3, 4, 6)


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


@pytest.fixture
def unpulled(monkeypatch):
    """Plain least squares, so that brute force is the same."""
    monkeypatch.setattr("secateur.repair_units.PULLS", (1e-12,))


def repaired(model: nn.Module, plan: Plan, data: list, **how):
    return refit(model, cut(model, plan), plan, Batches(data), **how)


def kept_of(groups: int, bias: bool) -> Plan:
    """Of every group of five channels between layers 0 and 1 those of `KEPT` stay, and of layer 1's outputs those of `ROWS`."""
    lines = tuple(5 * g + k for g in range(groups) for k in KEPT)
    cuts = [Cut("0.weight", 0, lines), Cut("0.bias", 0, lines), Cut("1.weight", 1, KEPT), Cut("1.weight", 0, ROWS)]
    return Plan(cuts=(*cuts, Cut("1.bias", 0, ROWS)) if bias else tuple(cuts))


@pytest.mark.usefixtures("unpulled")
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_the_least_squares_solution(bias):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 8, bias=bias)), correlated(200, 6)
    before = copy.deepcopy(model.state_dict())
    found = repaired(model, kept_of(1, bias), [x[:64], x[64:]])
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    old = model[1].bias.detach().double() if bias else None
    rows = model[0](x).detach().double()
    weight, intercept = brute_force(rows, torch.tensor(KEPT), model[1].weight.detach().double(), old)
    torch.testing.assert_close(found.tensors["1.weight"].double(), weight[list(ROWS)], rtol=1e-3, atol=1e-4)
    if bias:
        torch.testing.assert_close(found.tensors["1.bias"].double(), intercept[list(ROWS)], rtol=1e-3, atol=1e-4)
    assert found.notes == ()


@pytest.mark.usefixtures("unpulled")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_is_the_least_squares_solution_of_its_patches(groups, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(5 * groups, 8, 3, padding=1, stride=2, groups=groups, bias=bias)
    model, x = nn.Sequential(nn.Conv2d(7, 5 * groups, 1), conv), correlated(30, 7, 8, 8)
    found = repaired(model, kept_of(groups, bias), [x])
    keep = torch.tensor([c * 9 + k for c in KEPT for k in range(9)])
    hidden = model[0](x).detach()
    for g in range(groups):
        part = [r for r in ROWS if r // (8 // groups) == g]
        mine = [i for i, r in enumerate(ROWS) if r in part]
        patches = F.unfold(hidden[:, 5 * g : 5 * g + 5], 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 45).double()
        weight = conv.weight[part].detach().flatten(1).double()
        solution, intercept = brute_force(patches, keep, weight, conv.bias[part].detach().double() if bias else None)
        torch.testing.assert_close(found.tensors["1.weight"][mine].flatten(1).double(), solution, rtol=1e-3, atol=1e-3)
        if bias:
            torch.testing.assert_close(found.tensors["1.bias"][mine].double(), intercept, rtol=1e-3, atol=1e-3)


def test_bias_compensation_keeps_the_weights_and_the_mean_of_the_output():
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 8)), correlated(100, 6)
    plan = kept_of(1, True)
    found = repaired(model, plan, [x], bias_only=True)
    smaller = cut(model, plan)
    torch.testing.assert_close(found.tensors["1.weight"], smaller[1].weight.detach())
    write(smaller, found.tensors)
    torch.testing.assert_close(smaller(x).mean(0), model(x)[:, ROWS].mean(0), rtol=1e-4, atol=1e-4)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 8, bias=False))
    found = repaired(plain, kept_of(1, False), [x], bias_only=True)
    assert found.tensors == {}
    assert "'1.weight'" in found.notes[0]


class Block(nn.Module):
    """A residual block of linear layers whose second one has no bias and is followed by a BatchNorm."""

    def __init__(self, width: int):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False), nn.BatchNorm1d(width)
        nn.init.uniform_(self.norm.weight, -2, 2)
        nn.init.normal_(self.norm.bias)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        return x + self.norm(self.b(self.a(x).relu()))


class Plain(Block):
    """A block that ends in an activation."""

    def forward(self, x):
        return super().forward(x).relu()


class InPlace(Block):
    """The same, computed in place."""

    def forward(self, x):
        out = self.norm(self.b(self.a(x).relu_()))
        out += x
        return out.relu_()


def cut_blocks(count: int, kind: type[Block] = Block):
    torch.manual_seed(0)
    model, x = nn.Sequential(*(kind(6) for _ in range(count)), nn.Linear(6, 6)).eval(), correlated(300, 6)
    kept = tuple(range(7))
    cuts = [Cut(f"{i}.{t}", d, kept) for i in range(count) for t, d in (("a.weight", 0), ("a.bias", 0), ("b.weight", 1))]
    return model, Plan(cuts=tuple(cuts)), x


@pytest.mark.usefixtures("unpulled")
def test_each_block_is_fitted_to_the_sum_on_what_the_blocks_before_it_give():
    """By brute force: block by block least squares of what the BatchNorm has to be given for the sum to be the dense one's."""
    model, plan, x = cut_blocks(2)
    found = repaired(model, plan, [x[:100], x[100:]])
    smaller = cut(model, plan).double()
    dense, inputs, wanted = copy.deepcopy(model).double(), x.double(), x.double()
    for i in range(2):
        block = smaller[i]
        wanted = dense[i](wanted).detach()
        hidden = block.a(inputs).relu().detach()
        scale = (block.norm.weight / (block.norm.running_var + block.norm.eps).sqrt()).detach()
        target = (wanted - inputs - block.norm.bias) / scale + block.norm.running_mean
        design = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
        solution = torch.from_numpy(np.linalg.lstsq(design.numpy(), target.detach().numpy(), rcond=None)[0]).T
        torch.testing.assert_close(found.tensors[f"{i}.b.weight"].double(), solution[:, :-1], rtol=2e-3, atol=2e-3)
        block.b.weight.data.copy_(solution[:, :-1])
        block.norm.running_mean.sub_(solution[:, -1])
        torch.testing.assert_close(
            found.tensors[f"{i}.norm.running_mean"].double(), block.norm.running_mean, rtol=2e-3, atol=2e-3
        )
        inputs = block(inputs).detach()


def test_later_blocks_correct_the_earlier():
    """Repaired one after the other, two blocks come nearer to the dense output than with each fitted on dense inputs."""
    model, plan, x = cut_blocks(2)
    with torch.no_grad():
        wanted = model(x)
        one_by_one = cut(model, plan)
        write(one_by_one, repaired(model, plan, [x]).tensors)
        alone = cut(model, plan)
        for i in range(2):
            only = Plan(cuts=tuple(c for c in plan.cuts if c.tensor.startswith(f"{i}.")))
            write(alone, repaired(model, only, [x]).tensors)
        errors = [float((m(x) - wanted).square().mean()) for m in (one_by_one, alone, cut(model, plan))]
    assert errors[0] < 0.9 * errors[1] < 0.5 * errors[2]


def test_operations_in_place_change_nothing():
    found = []
    for kind in (Plain, InPlace):
        model, plan, x = cut_blocks(2, kind)
        found.append(repaired(model, plan, [x[:150], x[150:]]).tensors)
    assert {"0.b.weight", "0.norm.running_mean", "1.b.weight", "1.norm.running_mean"} == set(found[0]) == set(found[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_dense_outputs_may_take_several_passes(monkeypatch):
    model, plan, x = cut_blocks(2)
    once = repaired(model, plan, [x[:150], x[150:]]).tensors
    monkeypatch.setattr("secateur.repair_units.total_memory", lambda: 0)
    again = repaired(model, plan, [x[:150], x[150:]]).tensors
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_few_samples_are_not_fitted_exactly():
    """With fewer samples than inputs plain least squares is far off on new samples; the pull that is chosen is not."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 8)), torch.randn(1000, 20)
    plan = Plan(
        cuts=(Cut("0.weight", 0, tuple(range(40))), Cut("0.bias", 0, tuple(range(40))), Cut("2.weight", 1, tuple(range(40))))
    )
    new = x[50:]
    wanted = model(new).detach()

    def error(tensors) -> float:
        smaller = cut(model, plan)
        write(smaller, tensors)
        return (smaller(new) - wanted).square().mean().item()

    chosen = error(repaired(model, plan, [x[:50]]).tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.repair_units.PULLS", (1e-9,))
        assert chosen < 0.5 * error(repaired(model, plan, [x[:50]]).tensors)
    assert chosen < error({})


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
