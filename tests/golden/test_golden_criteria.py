"""Scores worked out by hand, and scores held against the change of the loss that they stand for."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from secateur.criteria import CRITERIA
from secateur.data.batches import Batches
from secateur.layers import find_layers
from secateur.stats import collect
from secateur.types import LayerStats, Need


def score(name: str, **stats) -> torch.Tensor:
    return CRITERIA[name].make(LayerStats(name="w", **{k: torch.as_tensor(v, dtype=torch.float32) for k, v in stats.items()}))


def scores_of(name: str, model: nn.Module, data: list, loss=None) -> dict[str, torch.Tensor]:
    found = collect(model, find_layers(model)[0], CRITERIA[name].facts["needs"], batches=Batches(data), loss=loss)
    return {n: CRITERIA[name].make(s) for n, s in found.layers.items()}


def half_square(model, batch):
    """A loss whose Hessian in the weights of one linear output is ``X^T X / n``."""
    return (model(batch[0]) - batch[1]).square().sum() / (2 * len(batch[0]))


def test_magnitude_of_the_example_that_every_text_begins_with():
    found = score("magnitude", weight=[[0.3, -0.8, 0.1], [-0.05, 0.9, -0.2]])
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.8, 0.1], [0.05, 0.9, 0.2]]))
    assert found.flatten().argsort().tolist() == [3, 2, 5, 0, 1, 4]  # the first three go: M = [[1, 1, 0], [0, 1, 0]]


def test_lamp_by_hand():
    # squares 1 9 4 4, from the largest: 9/9, then the first 4 over 13, the second over 17, and 1/18
    found = score("lamp", weight=[[1.0, -3.0], [2.0, -2.0]])
    torch.testing.assert_close(found, torch.tensor([[1 / 18, 1.0], [4 / 13, 4 / 17]]))


def test_multiflow_by_hand():
    # flows |w| a: 2 2 / 6 0; into outputs 2 and 3, out of inputs 4 and 1; up to one factor for the layer
    found = score("multiflow", weight=[[1.0, -2.0], [3.0, 0.0]], input_norm=[[2.0, 1.0]])
    expected = torch.tensor([[1.0 * 2 * 4, 2.0 * 2 * 1], [3.0 * 3 * 4, 0.0]])
    torch.testing.assert_close(found, expected / (3 * 4))


def test_obd_by_hand():
    found = score("obd", weight=[[2.0, -3.0]], grad_sq=[[0.5, 4.0]])
    assert found.tolist() == [[1.0, 18.0]]


def test_obd_is_the_loss_of_removal_on_a_diagonal_quadratic():
    curvature, best = torch.tensor([0.5, 2.0, 1.0, 8.0]), torch.tensor([1.0, -0.3, 0.0, 0.2])

    def loss(w):
        return (curvature * (w - best).square()).sum() / 2

    predicted = score("obd", weight=best[None], grad_sq=curvature[None])[0]
    for q in range(4):
        removed = best.clone()
        removed[q] = 0
        torch.testing.assert_close(loss(removed) - loss(best), predicted[q])


def test_obd_through_calibration_is_the_loss_of_removal():
    """Inputs are +-unit vectors and residuals +-1, so the squared per-sample gradients are the Hessian's diagonal exactly."""
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.7, -0.4, 0.1]]))
    x = torch.eye(3).repeat_interleave(torch.tensor([2, 4, 6]), dim=0)
    y = model(x).detach() + torch.tensor([1.0, -1.0]).repeat(6)[:, None]
    found = scores_of("obd", model, [(x[:5], y[:5]), (x[5:], y[5:])], half_square)["weight"][0]
    before = half_square(model, (x, y)).item()
    for q in range(3):
        keep = model.weight.detach().clone()
        with torch.no_grad():
            model.weight[0, q] = 0
        assert half_square(model, (x, y)).item() - before == pytest.approx(found[q].item(), rel=1e-5)
        with torch.no_grad():
            model.weight.copy_(keep)


def test_taylor_is_the_change_of_a_loss_that_is_linear_in_the_weights():
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    x, direction = torch.randn(6, 4), torch.randn(6, 3)
    loss = lambda m, batch: (m(batch[0]) * batch[1]).sum() / len(batch[0])  # noqa: E731
    found = scores_of("taylor", model, [(x[:4], direction[:4]), (x[4:], direction[4:])], loss)["0.weight"]
    before = loss(model, (x, direction)).item()
    for row, column in itertools.product(range(3), range(4)):
        assert before - _loss_without(model, (row, column), loss, (x, direction)) == pytest.approx(
            found[row, column].item(), abs=1e-5
        )
    assert before - _loss_without(model, (0, slice(None)), loss, (x, direction)) == pytest.approx(
        found[0].sum().item(), abs=1e-5
    )


def test_taylor_is_first_order_exact():
    """The error of the prediction falls with the square of the weight removed."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    data = (torch.randn(8, 4).double(), torch.randn(8, 1).double())
    errors = []
    for size in (1e-2, 1e-3):
        with torch.no_grad():
            model[0].weight[2, 1] = size
        predicted = scores_of("taylor", model, [data], half_square)["0.weight"][2, 1].item()
        kept = half_square(model, data).item()
        errors.append(abs(kept - _loss_without(model, (2, 1), half_square, data) - predicted))
    assert errors[1] < errors[0] / 50


def test_snip_is_taylors_magnitude_on_the_first_batch():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    first, second = [(torch.randn(5, 4), torch.randn(5, 1)) for _ in range(2)]
    snip = scores_of("snip", model, [first, second], half_square)
    for name, found in scores_of("taylor", model, [first], half_square).items():
        torch.testing.assert_close(snip[name], found.abs())
    # sensitivity to a multiplier c of each weight at c = 1 (eq. 4), taken directly
    c = torch.ones(3, 4, requires_grad=True)
    out = model[2](torch.tanh(first[0] @ (c * model[0].weight).t() + model[0].bias))
    loss = (out - first[1]).square().sum() / 10
    torch.testing.assert_close(snip["0.weight"], torch.autograd.grad(loss, c)[0].abs())


def test_synflow_of_two_linear_layers_is_the_sum_over_paths():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    first, second = model[0].weight.detach().abs(), model[1].weight.detach().abs()
    found = scores_of("synflow", model, [torch.randn(5, 4)])
    torch.testing.assert_close(found["0.weight"], first * second.sum(0)[:, None])
    torch.testing.assert_close(found["1.weight"], second * first.sum(1)[None])
    total = (second @ first).sum()
    assert all(torch.allclose(f.sum(), total) for f in found.values())


def test_wanda_by_hand():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
    x = torch.tensor([[3.0, 0.0], [4.0, -1.0]])  # column norms 5 and 1: the norms, not 25 and 1
    torch.testing.assert_close(scores_of("wanda", model, [x])["weight"], torch.tensor([[5.0, 2.0], [2.5, 3.0]]))


def test_grasp_by_hand_on_a_quadratic():
    """Loss sum h (w - 1)^2 / 2: gradient h (w - 1), so w (H g) = h^2 w (w - 1)."""
    model, h = nn.Linear(3, 1, bias=False), torch.tensor([1.0, 2.0, 3.0])
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 0.5, -1.0]]))
    loss = lambda m, batch: (h * (m.weight - 1).square()).sum() / 2  # noqa: E731
    torch.testing.assert_close(
        scores_of("grasp", model, [torch.zeros(1, 3)], loss)["weight"], torch.tensor([[2.0, -1.0, 18.0]])
    )


@pytest.mark.parametrize("seed", range(5))
def test_grasp_keeps_gradient_flow_by_brute_force(seed):
    """Its lowest weight is, of all single weights, (nearly) the one whose removal leaves the largest squared gradient norm;
    its highest, the smallest. With the paper's own sign it would be the other way round."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    data = (torch.randn(20, 4), torch.randint(0, 2, (20,)))
    loss = lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1])  # noqa: E731
    with torch.no_grad():  # small weights: the score is the first order of removal
        for parameter in model.parameters():
            parameter.mul_(0.3)
    weights = [model[0].weight, model[2].weight]
    found = torch.cat([s.flatten() for s in scores_of("grasp", model, [data]).values()])

    def flow() -> float:
        return sum(g.square().sum() for g in torch.autograd.grad(loss(model, data), weights)).item()

    before, left = flow(), []
    for weight in weights:
        for i in range(weight.numel()):
            kept = weight.detach().view(-1)[i].item()
            weight.detach().view(-1)[i] = 0
            left.append(flow())
            weight.detach().view(-1)[i] = kept
    left = torch.tensor(left)
    nearly = len(left) // 10
    assert (left > left[found.argmin()]).sum() <= nearly
    assert (left < left[found.argmax()]).sum() <= nearly
    assert left[found.argmin()] > before > left[found.argmax()]
    assert torch.corrcoef(torch.stack([before - left, 2 * found]))[0, 1] > 0.8


def test_grasp_needs_the_hessian_of_the_whole_data():
    """H and g of all samples, not the mean of each batch's own product."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    x, y = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])
    g, h = (1 * 2 + 3 * 5) / 2, (1 + 9) / 2
    for data in ([(x, y)], [(x[:1], y[:1]), (x[1:], y[1:])]):
        assert scores_of("grasp", model, data, half_square)["weight"].item() == pytest.approx(2 * h * g)


def test_the_needs_of_each_criterion():
    needs = {name: sorted(n.value for n in e.facts["needs"] - {Need.WEIGHT}) for name, e in CRITERIA.items()}
    assert needs == {
        "magnitude": [], "random": [], "lamp": [], "taylor": ["grad"], "snip": ["grad_one"], "grasp": ["hessian_grad"],
        "synflow": ["synflow_grad"], "obd": ["grad_sq"], "wanda": ["input_norm"], "movement": ["movement"],
        "woodfisher": ["grad_samples"], "multiflow": ["input_norm"],
    }  # fmt: skip


def _loss_without(model, index, loss, data) -> float:
    weight = model[0].weight.detach()
    kept = weight[index].clone()
    weight[index] = 0
    value = loss(model, data).item()
    weight[index] = kept
    return value
