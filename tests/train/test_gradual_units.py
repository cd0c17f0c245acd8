"""Units removed while training, masked until they are cut out."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import RecipeError, TrainingError


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(x + self.inner(x)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down, self.heads = nn.Linear(8, 24), nn.Linear(24, 8), 4

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, scale=0.7).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


def images(step, count=16):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    return x, x.mean((1, 2, 3)).mul(30).long().clamp(0, 9)


def train(model, optimizer, pruner, steps, *, start=0, each=lambda: None):
    for step in range(start, start + steps):
        x, y = images(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        each()


def test_channels_go_step_by_step_and_the_cut_model_is_the_masked_one():
    model = Residual()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    example, reached, before = images(0)[0], [], {}

    def each():
        reached.append(pruner.sparsity)
        for name, mask in pruner.masks.items():
            assert not model.get_parameter(name).detach()[~mask].any(), name
            assert not (mask & ~before.get(name, mask)).any(), f"{name}: what is removed stays removed"
        before.update(pruner.masks)

    with sc.gradual(
        model, optimizer, sparsity=0.5, pattern="channel", criterion="taylor", example=example, begin=2, end=10, every=2
    ) as pruner:
        train(model, optimizer, pruner, 12, each=each)
        assert reached == sorted(reached)
        assert len(set(reached)) > 3
        smaller, plan = pruner.cut()
    assert smaller.stem[0].out_channels == 4
    assert smaller.inner[0].out_channels == 6
    assert smaller.head[2].out_features == 8
    assert smaller.head[4].out_features == 10
    assert pruner.sparsity == 0.5
    x = images(99)[0]
    torch.testing.assert_close(smaller.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-6)
    again = sc.plan(Residual(), pattern="channel", sparsity=0.5, example=example)
    assert {c.tensor for c in plan.cuts} == {c.tensor for c in again.cuts}
    sc.finetune(smaller, [images(0)], steps=1)


def test_the_last_choice_is_the_one_that_pruning_at_once_makes():
    model = Residual()
    example = images(0)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"sparsity": 0.5, "pattern": "channel", "allocation": "global", "example": example}
    with sc.gradual(model, optimizer, schedule="one-shot", begin=3, end=4, every=1, **options) as pruner:
        train(model, optimizer, pruner, 2)
        x, y = images(2)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        expected = sc.prune(model, **options).plan
        pruner.step()
        assert pruner.cut()[1].cuts == expected.cuts
        pruner._step = 4


@pytest.mark.parametrize("pattern", ["head", "ffn", "ffn_head"])
def test_heads_and_feed_forward_neurons_of_a_transformer(pattern):
    model, x = Attention(), torch.randn(3, 5, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with sc.gradual(model, optimizer, sparsity=0.5, pattern=pattern, criterion="taylor", example=x, begin=1, end=4) as pruner:
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - x.flip(1)).square().mean().backward()
            optimizer.step()
            pruner.step()
        smaller, _ = pruner.cut()
    assert smaller.heads == (4 if pattern == "ffn" else 2)
    assert smaller.up.out_features == (24 if pattern == "head" else 12)
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-5, atol=1e-6)


def test_frozen_units_come_back():
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    returned, before = 0, {}

    def each():
        nonlocal returned
        returned += sum(int((mask & ~before.get(n, mask)).sum()) for n, mask in pruner.masks.items())
        before.update(pruner.masks)

    with sc.gradual(
        model, optimizer, sparsity=0.5, pattern="channel", criterion="movement", regrow="frozen", example=images(0)[0],
        schedule="one-shot", begin=1, end=12,
    ) as pruner:  # fmt: skip
        train(model, optimizer, pruner, 12, each=each)
    assert returned > 0
    assert pruner.sparsity == 0.5


@pytest.mark.parametrize("regrow", ["none", "frozen"])
def test_state_goes_through_a_file_and_ends_in_the_same_bits(regrow):
    def start():
        model = Residual()
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
        options = {"sparsity": 0.5, "pattern": "channel", "criterion": "taylor", "regrow": regrow, "example": images(0)[0]}
        return model, optimizer, sc.gradual(model, optimizer, begin=1, end=9, every=2, **options)

    whole, optimizer, pruner = start()
    with pruner:
        train(whole, optimizer, pruner, 11)
    model, optimizer, first = start()
    with first:
        train(model, optimizer, first, 6)
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict(), first.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    model, optimizer, second = start()
    for part, state in zip((model, optimizer, second), states, strict=True):
        part.load_state_dict(state)
    with second:
        train(model, optimizer, second, 5, start=6)
    assert second.masks.diff(pruner.masks) == {}
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_slimming_by_scales_needs_no_gradients_of_its_own():
    model = Residual()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with sc.gradual(
        model, optimizer, sparsity=0.5, pattern="channel", criterion="bn_scale", example=images(0)[0], begin=1, end=6
    ) as pruner:
        train(model, optimizer, pruner, 6)
        smaller, _ = pruner.cut()
    assert smaller.inner[0].out_channels == 6


def test_what_cannot_be():
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"sparsity": 0.5, "end": 5, "example": images(0)[0]}
    for changes, words in (
        ({"pattern": "channel", "example": None}, "pass example="),
        ({"pattern": "width"}, "would see the zeros"),
        ({"pattern": "layer"}, "takes whole blocks out"),
        ({"pattern": "channel", "force": ("stem.0[1]",)}, "force belong to sc.prune"),
        ({"pattern": "channel", "regrow": "rigl"}, "'rigl' is for single weights"),
        ({"pattern": "channel", "criterion": "bn_scale", "regrow": "frozen"}, "'frozen' under a criterion of weights"),
        ({"pattern": "channel", "criterion": "wanda"}, "input_norm, which a training step does not give"),
        ({"pattern": "channel", "criterion": "taylor_gate"}, "gate_sq, which a training step does not give"),
        ({"pattern": "channel", "allocation": "erk"}, "knows the allocations uniform, isomorphic, global"),
        ({"pattern": "channel", "sparsity": None}, "sparsity is missing"),
    ):
        with pytest.raises(RecipeError, match=words):
            sc.gradual(model, optimizer, **{**options, **changes})
    with pytest.raises(RecipeError, match="no units that could be cut out"):
        sc.gradual(model, optimizer, sparsity=0.5, end=5).cut()
    state = sc.gradual(model, optimizer, pattern="channel", **options).state_dict()
    with pytest.raises(TrainingError, match="other layers"):
        sc.gradual(model, optimizer, pattern="channel", ignore=["head"], **options).load_state_dict(state)
