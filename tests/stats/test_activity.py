"""Activations and gates of units, against gradients taken by hand, sample by sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.data.batches import Batches
from secateur.errors import LayerError, NonFiniteError, RecipeError, UnknownName
from secateur.stats.activity import Part, Site, activity
from secateur.types import UnitNeed

ALL = list(UnitNeed)[:3]


def whole(name: str, n: int) -> Part:
    return Part(name, torch.arange(n), torch.arange(n), n)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.c(self.b(torch.relu(self.norm(self.a(x)))).mean((2, 3)))


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = Conv().eval()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    return model, torch.randn(7, 3, 8, 8), torch.arange(7) % 3


def batches(x, y):
    return Batches([(x[:4], y[:4]), (x[4:5], y[4:5]), (x[5:], y[5:])])


def test_gates_after_a_norm_are_the_papers_sums_of_gamma_and_beta(problem):
    model, x, y = problem
    found = activity(model, [Site(model.norm, (whole("n", 6),), output=True)], ALL, batches(x, y))["n"]
    squares, absolute = torch.zeros(6), torch.zeros(6)
    for i in range(7):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        by_gamma, by_beta = torch.autograd.grad(loss, [model.norm.weight, model.norm.bias])
        g = by_gamma * model.norm.weight.detach() + by_beta * model.norm.bias.detach()
        squares += g.square() / 7
        absolute += g.abs() / 7
    torch.testing.assert_close(found[UnitNeed.GATE_SQ], squares, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found[UnitNeed.GATE_ABS], absolute, rtol=1e-4, atol=1e-8)


def test_inputs_are_seen_where_they_are_read_and_folded_into_units(problem):
    model, x, y = problem
    pairs = Part("pairs", torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2]), 3)
    found = activity(model, [Site(model.b, (whole("b", 6), pairs))], ALL, batches(x, y))
    a = torch.relu(model.norm(model.a(x))).detach()
    torch.testing.assert_close(found["b"][UnitNeed.ACTIVATION_NORM], a.square().sum((0, 2, 3)).sqrt())
    gates = torch.zeros(7, 6)
    for i in range(7):
        one = a[i : i + 1].requires_grad_()
        loss = F.cross_entropy(model.c(model.b(one).mean((2, 3))), y[i : i + 1])
        gates[i] = (torch.autograd.grad(loss, one)[0] * one.detach()).sum((0, 2, 3))
        a = a.detach()
    torch.testing.assert_close(found["b"][UnitNeed.GATE_ABS], gates.abs().mean(0), rtol=1e-4, atol=1e-8)
    folded = gates[:, :3] + gates[:, 3:]
    torch.testing.assert_close(found["pairs"][UnitNeed.GATE_ABS], folded.abs().mean(0), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found["pairs"][UnitNeed.GATE_SQ], folded.square().mean(0), rtol=1e-4, atol=1e-8)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x, attention_mask=None):
        return (self.down(torch.relu(self.up(x))) * attention_mask[..., None]).sum(1)


def test_positions_belong_to_their_sample_and_padding_to_none():
    torch.manual_seed(0)
    model, x = Tokens(), torch.randn(3, 6, 4)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, 4:] = 0
    batch = {"x": x, "attention_mask": mask}

    def loss(m, b):
        return m(b["x"], b["attention_mask"]).square().mean()

    found = activity(model, [Site(model.down, (whole("d", 5),))], ALL, Batches([batch]), loss=loss)["d"]
    a = torch.relu(model.up(x)).detach() * mask[..., None]
    torch.testing.assert_close(found[UnitNeed.ACTIVATION_NORM], a.square().sum((0, 1)).sqrt())
    gates = []
    for i in range(3):
        gate = torch.ones(5, requires_grad=True)
        out = ((F.linear(a[i] * gate, model.down.weight, model.down.bias)) * mask[i, :, None]).sum(0)
        gates.append(torch.autograd.grad(out.square().mean(), gate)[0])
    torch.testing.assert_close(found[UnitNeed.GATE_ABS], torch.stack(gates).abs().mean(0))


class Flattened(Tokens):
    """The same with all tokens in one row, as some transformers have them."""

    def forward(self, x, attention_mask=None):
        rows = self.down(torch.relu(self.up(x.flatten(0, 1)))).unflatten(0, x.shape[:2])
        return (rows * attention_mask[..., None]).sum(1)


def test_padding_is_left_out_where_tokens_are_in_one_row():
    torch.manual_seed(0)
    model, flattened, x = Tokens(), Flattened(), torch.randn(3, 6, 4)
    flattened.load_state_dict(model.state_dict())
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, 4:] = 0
    data = Batches([{"x": x, "attention_mask": mask}])

    def loss(m, b):
        return m(b["x"], b["attention_mask"]).square().mean()

    wanted, found = (activity(m, [Site(m.down, (whole("d", 5),))], ALL, data, loss=loss)["d"] for m in (model, flattened))
    for need in ALL:
        torch.testing.assert_close(found[need], wanted[need])


def test_infinite_activations_are_named(problem):
    model, x, y = problem
    with torch.no_grad():
        model.a.weight[0] = 1e30
        model.norm.weight[0] = 1e30
    with pytest.raises(NonFiniteError):
        activity(model, [Site(model.b, (whole("b", 6),))], ALL, batches(x, y))


def scores_of(model, criterion, data, **changes):
    """Kept outputs of the first convolution, one unit cut after the other: the order of the scores."""
    kept = []
    for i in range(1, 6):
        plan = sc.plan(model, pattern="channel", sparsity=i / 6, criterion=criterion, data=data, layers=["a"], **changes)
        kept.append(next(set(c.kept) for c in plan.cuts if c.tensor == "a.weight"))
    return [next(iter(a - b)) for a, b in zip([set(range(6)), *kept], kept, strict=False)]


def test_criteria_rank_as_brute_force_does(problem):
    model, x, y = problem
    data = [(x, y)]
    w = model.a.weight.detach().flatten(1)
    distance = torch.stack([torch.stack([(p - q).norm() for q in w]).sum() for p in w])
    a = torch.relu(model.norm(model.a(x))).detach()
    norm = a.square().sum((0, 2, 3)).sqrt()
    reads = model.b.weight.detach().abs().sum((0, 2, 3))
    wanted = {
        "fpgm": distance,
        "bn_scale": model.norm.weight.detach().abs(),
        "activation_norm": norm,
        "wanda_unit": norm * reads,
    }
    for criterion, scores in wanted.items():
        assert scores_of(model, criterion, data) == scores.argsort()[:5].tolist(), criterion


def test_a_closed_gate_changes_the_loss_as_foretold(problem):
    """First order: scaling a channel by 1 - e changes each sample's loss by -e g."""
    model, x, y = problem
    found = activity(model, [Site(model.b, (whole("b", 6),))], ALL, Batches([(x[:1], y[:1])]))["b"]
    a = torch.relu(model.norm(model.a(x[:1]))).detach().double()
    model = model.double()
    for j in range(6):
        scaled = a.clone()
        scaled[:, j] *= 1 - 1e-5
        before, after = (F.cross_entropy(model.c(model.b(z).mean((2, 3))), y[:1]) for z in (a, scaled))
        assert abs(float((before - after).detach())) / 1e-5 == pytest.approx(
            float(found[UnitNeed.GATE_ABS][j]), rel=1e-2, abs=1e-6
        )


@pytest.mark.parametrize(
    ("combine", "reference"),
    [("first", lambda out, reads: out), ("sum", lambda out, reads: out + reads), ("max", torch.maximum)],
)
def test_slices_of_a_unit_are_combined_as_asked(problem, combine, reference):
    model, x, y = problem
    out, reads = model.a.weight.detach().abs().mean((1, 2, 3)), model.b.weight.detach().abs().mean((0, 2, 3))
    pattern = {"name": "channel", "combine": combine}
    plan = sc.plan(model, pattern=pattern, sparsity=0.5, data=[(x, y)], layers=["a"])
    kept = next(c.kept for c in plan.cuts if c.tensor == "a.weight")
    assert list(kept) == sorted(reference(out, reads).argsort()[3:].tolist())


def test_normalised_groups_compete_on_equal_terms():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2)), torch.randn(2, 4)
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
        model[2].weight.mul_(1e-3)
    keys = {"sparsity": 0.5, "example": x, "allocation": "global"}
    plain = sc.prune(model, pattern={"name": "ffn", "normalize": "none"}, **keys).model
    assert plain[0].out_features == 1
    for normalize in ("auto", "mean", "max"):
        equal = sc.prune(model, pattern={"name": "ffn", "normalize": normalize, "combine": "first"}, **keys).model
        assert 1 < equal[0].out_features < 9


def test_what_cannot_be_scored_is_left_alone_and_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 16, 3))
    result = sc.prune(model, pattern="channel", sparsity=0.5, criterion="bn_scale", example=torch.randn(1, 3, 8, 8))
    assert (result.model[0].out_channels, result.model[2].out_channels) == (4, 6)
    assert any("'2.weight'" in n and "normalisation" in n for n in result.report.notes)
    with pytest.raises(LayerError, match="normalisation"):
        sc.prune(model, pattern="channel", sparsity=0.5, criterion="bn_scale", example=torch.randn(1, 3, 8, 8), ignore=["1"])


def test_what_does_not_fit_together_is_refused():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(2, 4)
    for changes, error, words in (
        ({"criterion": "fpgn", "pattern": "channel"}, UnknownName, "fpgm"),
        ({"criterion": "fpgm"}, RecipeError, "whole units"),
        ({"criterion": "fpgm", "pattern": "channel", "reduction": "sum"}, RecipeError, "nothing to reduce"),
        ({"criterion": "taylor_gate", "pattern": "channel"}, RecipeError, "pass data="),
        ({"pattern": {"name": "channel", "combine": "median"}}, RecipeError, "together"),
        ({"pattern": {"name": "channel", "normalize": True}}, RecipeError, "mean"),
    ):
        with pytest.raises(error, match=words):
            sc.prune(model, sparsity=0.5, example=x, **changes)


def test_a_need_that_no_module_can_show_is_no_crash():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(LayerError, match="normalisation"):
        sc.plan(model, pattern="ffn", sparsity=0.5, criterion="taylor_gate", data=[(torch.randn(2, 4), torch.arange(2))])
