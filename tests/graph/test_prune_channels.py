from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.errors import LayerError, ModelError, RecipeError, UnknownName
from secateur.graph import cut, make_plan, prune_channels, recut, trace
from secateur.types import Plan


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 3))


def forward(model, *inputs):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(*inputs)


def test_mlp_by_hand():
    model, x = mlp(), torch.randn(4, 6)
    graph = trace(model, x)
    assert [(g.kind, g.units, g.reason is None) for g in graph.groups] == [
        ("neuron", 8, True),
        ("neuron", 6, False),
        ("neuron", 10, True),
        ("neuron", 3, False),
    ]
    plan = make_plan(graph, model, {0: [1, 5], 2: [0]})
    smaller = cut(model, plan)
    assert [tuple(p.shape) for p in smaller.parameters()] == [(6, 6), (6,), (9, 6), (9,), (3, 9), (3,)]
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked[2].weight[:, [1, 5]] = 0
        masked[4].weight[:, 0] = 0
    assert torch.allclose(forward(smaller, x), forward(masked, x), atol=1e-6)


def test_lowest_scores_go_and_ties_go_by_index():
    model = mlp()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[2].weight.fill_(1.0)
        model[0].weight[3] = 0.5
    _, plan = prune_channels(model, torch.randn(1, 6), 0.25)
    assert next(c.kept for c in plan.cuts if c.tensor == "0.weight") == (0, 1, 2, 4, 5, 6)


def test_model_is_untouched_and_has_no_hooks():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 2)), torch.randn(2, 3, 6, 6)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    smaller, _ = prune_channels(model, x, 0.5)
    assert model.training
    assert smaller.training
    assert all(type(v) is not torch.Tensor or torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {type(m) for m in smaller.modules()} == {type(m) for m in model.modules()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in smaller.modules())
    assert (smaller[0].out_channels, smaller[1].num_features, smaller[3].in_features) == (4, 4, 64)
    assert all(p.requires_grad and p.is_leaf for p in smaller.parameters())
    smaller(x).sum().backward()


def test_plan_survives_json_and_is_carried_out_on_a_fresh_model():
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1)),
        torch.randn(1, 3, 9, 9),
    )
    smaller, plan = prune_channels(model, x, 0.5)
    plan = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    fresh = recut(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1)), plan)
    fresh.load_state_dict(smaller.state_dict())
    assert fresh[1].groups == 4
    assert torch.equal(forward(fresh, x), forward(smaller, x))


def test_a_cut_model_can_be_cut_again():
    model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(2, 6)
    once, _ = prune_channels(model, x, 0.5)
    twice, _ = prune_channels(once, x, 0.5)
    assert twice[0].out_features == 4


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.norm = nn.GroupNorm(4, 12)
        self.outer = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.outer(F.relu(self.norm(self.inner(x))))
        return self.head(x.mean((2, 3)))


def test_residual_sum_couples_its_sides():
    graph = trace(Residual(), torch.randn(1, 3, 6, 6))
    group = next(g for g in graph.units() if g.name == "stem.weight")
    assert {(m.tensor, m.dim) for m in group.members} == {
        ("stem.weight", 0), ("stem.bias", 0), ("inner.weight", 1), ("outer.weight", 0), ("outer.bias", 0), ("head.weight", 1),
    }  # fmt: skip
    prune_channels(Residual(), torch.randn(1, 3, 6, 6), 0.5)


class OptionA(nn.Module):
    """Shortcut of the CIFAR ResNets: every other position, channels padded with zeros on both sides."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1), nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(self.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.c(x.mean((2, 3)))


def test_option_a_shortcut_cuts_the_channels_that_are_not_padding():
    smaller, plan = prune_channels(OptionA(), torch.randn(2, 3, 8, 8), 0.5)
    assert smaller.a.out_channels == 4
    assert smaller.b.out_channels == 12
    kept = next(c.kept for c in plan.cuts if c.tensor == "b.weight" and c.dim == 0)
    assert set(kept) >= {*range(4), *range(12, 16)}


class Glu(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(8, 6)

    def forward(self, x):
        a, b = self.up(x).chunk(2, -1)
        return self.down(a * F.silu(b))


def test_gated_halves_lose_exactly_what_was_asked():
    smaller, _ = prune_channels(Glu(), torch.randn(2, 6), 0.5)
    assert smaller.up.out_features == 8
    assert smaller.down.in_features == 4


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(F.relu(self.first(self.stem(x)))))


def test_tied_weights_stay_tied_and_are_cut_alike_on_both_sides():
    smaller, plan = prune_channels(Tied(), torch.randn(2, 3), 0.5)
    assert smaller.first.weight is smaller.second.weight
    assert smaller.first.weight.shape == (3, 3)
    kept = {(c.tensor, c.dim): c.kept for c in plan.cuts}
    assert kept["first.weight", 0] == kept["first.weight", 1] == kept["stem.weight", 0]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.c(self.b(F.relu(self.b(F.relu(self.a(x))))))


def test_a_module_called_twice_is_cut_alike_on_both_sides():
    smaller, plan = prune_channels(Twice(), torch.randn(2, 4), 0.5)
    kept = {(c.tensor, c.dim): c.kept for c in plan.cuts}
    assert kept["b.weight", 0] == kept["b.weight", 1]
    assert smaller.b.weight.shape == (4, 4)


class Written(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8 * 16, 2)
        self.flat = 8 * 16
        self.number = number

    def forward(self, x):
        y = self.a(x)
        return self.b(y.view(-1, 128) if self.number else y.view(-1, self.flat))


def test_a_size_written_as_a_number_stays_and_one_in_an_attribute_follows():
    x = torch.randn(2, 3, 6, 6)
    graph = trace(Written(True), x)
    assert graph.units() == []
    assert "128" in next(g.reason for g in graph.groups if g.name == "a.weight")
    smaller, plan = prune_channels(Written(False), x, 0.5)
    assert smaller.flat == 64
    assert plan.attributes == {"flat": 64}


class Heads(nn.Module):
    def __init__(self, dim=16, heads=4, kv=2, head_dim=8):
        super().__init__()
        self.heads, self.kv, self.head_dim = heads, kv, head_dim
        self.q, self.k = nn.Linear(dim, heads * head_dim), nn.Linear(dim, kv * head_dim)
        self.v, self.o = nn.Linear(dim, kv * head_dim), nn.Linear(heads * head_dim, dim)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, n, self.kv, self.head_dim).transpose(1, 2)
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.o(y.transpose(1, 2).reshape(b, n, -1))


def test_grouped_query_heads_go_with_their_keys_and_values():
    smaller, plan = prune_channels(Heads(), torch.randn(2, 5, 16), 0.5, kinds=("head",))
    assert (smaller.heads, smaller.kv, smaller.head_dim) == (2, 1, 8)
    assert smaller.q.out_features == 16
    assert smaller.v.out_features == 8
    kept = {c.tensor: c.kept for c in plan.cuts if c.dim == 0}
    assert kept["k.weight"] == kept["v.weight"]
    first = kept["k.weight"][0]
    assert kept["q.weight"] == tuple(range(2 * first, 2 * first + 16))


def test_head_dimensions_of_queries_and_values_are_cut_apart():
    smaller, _ = prune_channels(Heads(), torch.randn(2, 5, 16), 0.5, kinds=("head_dim",))
    assert smaller.head_dim == 4
    assert smaller.q.out_features == 16


def test_operation_without_a_rule_freezes_what_touches_it_and_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(torch.fft.fft(self.a(x)).real)

    graph = trace(Odd(), torch.randn(2, 4))
    assert graph.units() == []
    assert any("fft" in op for op in graph.unknown)
    assert "fft" in next(g.reason for g in graph.groups if g.name == "a.weight")


def test_meta_model_is_planned_without_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    graph = trace(model, torch.randn(2, 6))
    plan = make_plan(graph, model, {graph.units()[0].id: [0, 1]})
    assert cut(model, plan)[0].weight.shape == (6, 6)


@pytest.mark.parametrize("sparsity", [1.0, -0.5, 1, True])
def test_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(RecipeError, match="float"):
        prune_channels(mlp(), torch.randn(1, 6), sparsity)


def test_nothing_to_cut_is_an_error_and_not_a_silent_copy():
    with pytest.raises(LayerError, match="output of the model"):
        prune_channels(nn.Linear(4, 8), torch.randn(1, 4), 0.5)


def test_ignored_layers_stay_as_they_are_and_have_to_exist():
    smaller, _ = prune_channels(mlp(), torch.randn(1, 6), 0.5, ignore=("4",))
    assert smaller[4].weight.shape == (3, 10)
    assert smaller[0].out_features == 4
    with pytest.raises(UnknownName, match="'5'"):
        prune_channels(mlp(), torch.randn(1, 6), 0.5, ignore=("5",))


def test_parts_that_the_forward_does_not_use_are_named():
    class Extra(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            self.unused = nn.ModuleList([nn.Linear(8, 3)])

        def forward(self, x):
            return self[2](self[1](self[0](x)))

    _, plan = prune_channels(Extra(), torch.randn(1, 4), 0.5)
    assert "does not use" in plan.skipped["unused.0.weight"]


def test_round_to_and_min_width():
    model = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 2))
    assert prune_channels(model, torch.randn(1, 4), 0.5, round_to=16)[0][0].out_features == 16
    assert prune_channels(model, torch.randn(1, 4), 0.9, min_width=7)[0][0].out_features == 7


def test_global_scope_takes_from_where_scores_are_low():
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    smaller, _ = prune_channels(model, torch.randn(1, 4), 0.5, scope="global", scores=lambda name, w: w.abs())
    assert smaller[0].out_features + smaller[2].out_features == 10


def test_emptying_a_layer_is_refused_by_name():
    model, x = mlp(), torch.randn(1, 6)
    graph = trace(model, x)
    with pytest.raises(LayerError, match=r"0\.weight"):
        make_plan(graph, model, {0: range(8)})


def test_plan_of_another_model_is_refused():
    model, x = mlp(), torch.randn(1, 6)
    _, plan = prune_channels(model, x, 0.5)
    with pytest.raises(ModelError, match=r"0\.weight"):
        cut(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 10), nn.GELU(), nn.Linear(10, 3)), plan)
    with pytest.raises(ModelError, match="another model"):
        cut(nn.Linear(6, 3), plan)


def test_forward_that_fails_says_so():
    with pytest.raises(ModelError, match="fails on the example"):
        trace(mlp(), torch.randn(1, 7))


def test_forward_that_reads_values_is_traced_on_real_tensors_and_says_so():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            y = self.a(x)
            return self.b(y) if x.sum().item() > 1e9 else self.b(F.relu(y))

    graph = trace(Reads(), torch.randn(2, 4))
    assert "real tensors" in graph.notes[0]
    assert graph.units()


def test_a_cut_that_would_send_the_forward_another_way_is_refused():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            y = self.a(x)
            return self.b(F.relu(y) if y.shape[-1] > 5 else y)

    prune_channels(Branches(), torch.randn(2, 4), 0.25)
    with pytest.raises(LayerError, match="would be 4 > 5"):
        prune_channels(Branches(), torch.randn(2, 4), 0.5)


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 10**6))
def test_grouped_convolutions(multiplier, width, groups, transposed, seed):
    torch.manual_seed(seed)
    channels = groups * width * 2
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(
        nn.Conv2d(3, channels, 1),
        kind(channels, channels * multiplier, 3, groups=groups),
        nn.BatchNorm2d(channels * multiplier),
        nn.Conv2d(channels * multiplier, 4, 1),
    )
    smaller, _ = prune_channels(model, torch.randn(1, 3, 5, 5), 0.5)
    assert smaller[0].out_channels < channels


class Backbone(nn.Module):
    """Returns features of two stages, of which the first are read inside as well, and a number of them all."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3)

    def forward(self, x):
        early = self.norm(self.one(x)).relu()
        late = self.two(early)
        return {"early": early, "late": late, "both": late.mean()}


def test_outputs_are_cut_when_that_is_asked_for_and_only_then(tmp_path):
    torch.manual_seed(0)
    model, x = Backbone().eval(), torch.randn(2, 3, 9, 9)
    with pytest.raises(LayerError, match="output of the model"):
        prune_channels(model, x, 0.5)
    smaller, plan = prune_channels(model, x, 0.5, outputs=True)
    found, whole = smaller(x), model(x)
    assert found["early"].shape == (2, 4, 7, 7)
    assert found["late"].shape == (2, 6, 5, 5)
    kept = {c.tensor: list(c.kept) for c in plan.cuts if c.dim == 0}
    assert torch.allclose(found["early"], whole["early"][:, kept["one.weight"]], atol=1e-6)
    with torch.no_grad():
        masked = whole["early"] * torch.isin(torch.arange(8), torch.tensor(kept["one.weight"]))[:, None, None]
        late = model.two(masked)[:, kept["two.weight"]]
    assert torch.allclose(found["late"], late, atol=1e-6)
    assert torch.allclose(found["both"], late.mean(), atol=1e-6)
    keys = {"pattern": {"name": "channel", "outputs": True}, "sparsity": 0.5, "example": x}
    result = sc.prune(model, out=tmp_path / "run", **keys)
    again = sc.load(tmp_path / "run", model=Backbone()).eval()
    assert torch.equal(again(x)["late"], result.model(x)["late"])
    budget = sc.plan(model, **{**keys, "sparsity": None, "budget": "50% MACs"}).budget
    assert budget.promised <= budget.limit
