# ruff: noqa: E501 - a table reads best with a case on a line
"""Every operation that structural pruning has to follow, in a small network of its own.

`prune_channels` compares each cut with the masked original and raises where they differ, so that what is asserted here is that
something was cut: by how much the named tensors shrank.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from secateur.errors import ModelError
from secateur.graph import cut, difference, make_plan, prune_channels, trace
from secateur.types import Plan


class Net(nn.Module):
    """Layers by name, and a forward given as a function of them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            if isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            else:
                self.add_module(name, layer)

    def forward(self, *inputs: Tensor):
        return self.run(self, *inputs)


def image(m: nn.Module, *shape: int) -> Tensor:
    return torch.randn(2, 3, *(shape or (6, 6)))


def conv(a: int, b: int, k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **options)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5, 6)))


def shift(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).unflatten(2, (4, 4)).roll((1, 1), (1, 2))
    return m.b(y.flatten(2))


def baddbmm_attention(m: Net, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = (layer(x).view(b, n, -1, 3).transpose(1, 2) for layer in (m.q, m.k, m.v))
    heads = q.shape[1]
    q, k, v = (t.reshape(b * heads, n, 3) for t in (q, k, v))
    scores = torch.baddbmm(torch.zeros(b * heads, n, n), q, k.transpose(1, 2), alpha=0.5).softmax(-1)
    return m.b(torch.bmm(scores, v).view(b, heads, n, 3).transpose(1, 2).reshape(b, n, -1))


def rotary(m: Net, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = (layer(x).view(b, n, -1, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
    angle = torch.arange(n)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])

    def turned(t: Tensor) -> Tensor:
        first, second = t.chunk(2, -1)
        return t * angle.cos() + torch.cat((-second, first), -1) * angle.sin()

    y = F.scaled_dot_product_attention(turned(q), turned(k).expand_as(q), v.expand_as(q), is_causal=True)
    return m.b(y.transpose(1, 2).flatten(2))


def multi_query(m: Net, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q = m.q(x).view(b, n, -1, 4).transpose(1, 2)
    k, v = (layer(x).view(b, n, 1, 4).transpose(1, 2) for layer in (m.k, m.v))
    return m.b(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def shuffled(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    b, c, h, w = y.shape
    return m.b(y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


def excited(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y * m.up(F.relu(m.down(F.adaptive_avg_pool2d(y, 1)))).sigmoid())


linear = nn.Linear
CASES = {
    # matrix products
    "linear": (lambda m, x: m.b(F.relu(m.a(x))), {"a": linear(6, 8), "b": linear(8, 2)}, tokens(), "a.weight"),
    "matmul": (lambda m, x: (x @ m.w).tanh() @ m.v, {"w": nn.Parameter(torch.randn(6, 8)), "v": nn.Parameter(torch.randn(8, 2))}, tokens(), "w"),
    "addmm": (lambda m, x: m.b(torch.addmm(m.t, x, m.w)), {"t": nn.Parameter(torch.randn(8)), "w": nn.Parameter(torch.randn(6, 8)), "b": linear(8, 2)}, tokens(5, 6), "w"),
    "einsum": (lambda m, x: torch.einsum("bnk,ko->bno", torch.einsum("bnc,kc->bnk", x, m.w).relu(), m.v), {"w": nn.Parameter(torch.randn(8, 6)), "v": nn.Parameter(torch.randn(8, 2))}, tokens(), "w"),
    "baddbmm": (baddbmm_attention, {n: linear(6, 12) for n in "qkv"} | {"b": linear(12, 2)}, tokens(), "v.weight"),
    # convolutions
    "conv1d": (lambda m, x: m.b(m.n(m.a(x))), {"a": nn.Conv1d(3, 8, 3), "n": nn.BatchNorm1d(8), "b": nn.Conv1d(8, 2, 1)}, torch.randn(2, 3, 9), "a.weight"),
    "conv3d": (lambda m, x: m.b(m.n(m.a(x)).relu()), {"a": nn.Conv3d(3, 8, 3), "n": nn.BatchNorm3d(8), "b": nn.Conv3d(8, 2, 1)}, torch.randn(1, 3, 4, 5, 5), "a.weight"),
    "transposed": (lambda m, x: m.b(m.a(x)), {"a": nn.ConvTranspose2d(3, 8, 2, stride=2), "b": conv(8, 2)}, torch.randn(2, 3, 4, 4), "a.weight"),
    "transposed3d": (lambda m, x: m.b(m.a(x)), {"a": nn.ConvTranspose3d(3, 8, 2), "b": nn.Conv3d(8, 2, 1)}, torch.randn(1, 3, 3, 3, 3), "a.weight"),
    "transposed1d grouped": (lambda m, x: m.b(m.t(m.a(x))), {"a": nn.Conv1d(3, 8, 1), "t": nn.ConvTranspose1d(8, 8, 2, groups=4), "b": nn.Conv1d(8, 2, 1)}, torch.randn(2, 3, 6), "t.weight"),
    "grouped": (lambda m, x: m.b(m.g(m.a(x))), {"a": conv(3, 8), "g": conv(8, 8, groups=4), "b": conv(8, 2)}, image(None), "a.weight"),
    "depthwise": (lambda m, x: m.b(m.g(m.a(x))), {"a": conv(3, 8), "g": conv(8, 8, groups=8), "b": conv(8, 2)}, image(None), "g.weight"),
    # normalisations
    "layer norm": (lambda m, x: m.b(m.n(m.a(x))), {"a": linear(6, 8), "n": nn.LayerNorm(8), "b": linear(8, 2)}, tokens(), "n.weight"),
    "rms norm": (lambda m, x: m.b(m.n(m.a(x))), {"a": linear(6, 8), "n": nn.RMSNorm(8), "b": linear(8, 2)}, tokens(), "n.weight"),
    "group norm": (lambda m, x: m.b(m.n(m.a(x))), {"a": conv(3, 8), "n": nn.GroupNorm(2, 8), "b": conv(8, 2)}, image(None), "n.weight"),
    "instance norm": (lambda m, x: m.b(m.n(m.a(x))), {"a": conv(3, 8), "n": nn.InstanceNorm2d(8, affine=True), "b": conv(8, 2)}, image(None), "n.weight"),
    # elementwise
    "broadcast": (lambda m, x: m.b(m.a(x) * m.g + m.s), {"a": linear(6, 8), "g": nn.Parameter(torch.randn(8)), "s": nn.Parameter(torch.randn(1, 1, 8)), "b": linear(8, 2)}, tokens(), "s"),
    "glu": (lambda m, x: m.b(F.glu(m.a(x))), {"a": linear(6, 16), "b": linear(8, 2)}, tokens(), "a.weight"),
    "swiglu": (lambda m, x: m.b(F.silu(m.a(x)) * m.c(x)), {"a": linear(6, 8), "c": linear(6, 8), "b": linear(8, 2)}, tokens(), "c.weight"),
    "geglu": (lambda m, x: m.b((lambda u, g: u * F.gelu(g))(*m.a(x).chunk(2, -1))), {"a": linear(6, 16), "b": linear(8, 2)}, tokens(), "a.weight"),
    "prelu": (lambda m, x: m.b(m.p(m.a(x))), {"a": conv(3, 8), "p": nn.PReLU(8), "b": conv(8, 2)}, image(None), "p.weight"),
    # moving indices
    "concat": (lambda m, x: m.b(torch.cat((m.a(x), m.c(x)), 1)), {"a": conv(3, 8), "c": conv(3, 4), "b": conv(12, 2)}, image(None), "c.weight"),
    "split": (lambda m, x: m.b(sum(m.a(x).split(4, -1))), {"a": linear(6, 8), "b": linear(4, 2)}, tokens(), None),
    "chunk": (lambda m, x: m.b(torch.mul(*m.a(x).chunk(2, -1))), {"a": linear(6, 16), "b": linear(8, 2)}, tokens(), "a.weight"),
    "unbind": (lambda m, x: m.b(sum(m.a(x).unflatten(-1, (2, -1)).unbind(2))), {"a": linear(6, 16), "b": linear(8, 2)}, tokens(), "a.weight"),
    "slice": (lambda m, x: m.b(m.a(x)[:, 1:]), {"a": linear(6, 8), "b": linear(8, 2)}, tokens(), "a.weight"),
    "narrow": (lambda m, x: m.b(m.a(x).narrow(1, 1, 3)), {"a": linear(6, 8), "b": linear(8, 2)}, tokens(), "a.weight"),
    "index select": (lambda m, x: m.b(m.a(x).index_select(1, torch.tensor([0, 3]))), {"a": linear(6, 8), "b": linear(8, 2)}, tokens(), "a.weight"),
    "permute": (lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1)), {"a": conv(3, 8), "b": linear(8, 2)}, image(None), "a.weight"),
    "reshape": (lambda m, x: m.b(m.a(x).reshape(x.shape[0], -1)), {"a": conv(3, 8), "b": linear(8 * 36, 2)}, image(None), "b.weight"),
    "flatten": (lambda m, x: m.b(m.a(x).flatten(1)), {"a": conv(3, 8), "b": linear(8 * 36, 2)}, image(None), "b.weight"),
    "unflatten and roll": (shift, {"a": linear(6, 16), "b": linear(16, 2)}, tokens(), None),
    "roll": (lambda m, x: m.b(m.a(x).roll(2, 1)), {"a": linear(6, 8), "b": linear(8, 2)}, tokens(), "a.weight"),
    "squeeze": (lambda m, x: m.b(m.a(x).mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1)), {"a": conv(3, 8), "b": linear(8, 2)}, image(None), "a.weight"),
    "unsqueeze": (lambda m, x: m.b(m.a(x).unsqueeze(1)), {"a": linear(6, 8), "b": linear(8, 2)}, tokens(), "a.weight"),
    "expand": (lambda m, x: m.b(torch.cat((m.t.expand(x.shape[0], -1, -1), m.a(x)), 1)), {"a": linear(6, 8), "t": nn.Parameter(torch.randn(1, 1, 8)), "b": linear(8, 2)}, tokens(), "t"),
    "repeat": (lambda m, x: m.b(m.t.repeat(x.shape[0], 1, 1) + m.a(x)), {"a": linear(6, 8), "t": nn.Parameter(torch.randn(1, 1, 8)), "b": linear(8, 2)}, tokens(), "t"),
    "pixel shuffle": (lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), {"a": conv(3, 32), "b": conv(8, 2)}, image(None), "b.weight"),
    "pixel unshuffle": (lambda m, x: m.b(F.pixel_unshuffle(m.a(x), 2)), {"a": conv(3, 8), "b": conv(32, 2)}, image(None), "a.weight"),
    "channel shuffle": (shuffled, {"a": conv(3, 8), "b": conv(8, 2)}, image(None), "a.weight"),
    "torch's channel shuffle": (lambda m, x: m.b(F.channel_shuffle(m.a(x), 2)), {"a": conv(3, 8), "b": conv(8, 2)}, image(None), "a.weight"),
    # space and reductions
    "max pool": (lambda m, x: m.b(F.max_pool2d(m.a(x), 2)), {"a": conv(3, 8), "b": conv(8, 2)}, image(None), "a.weight"),
    "average pool": (lambda m, x: m.b(F.avg_pool2d(m.a(x), 2)), {"a": conv(3, 8), "b": conv(8, 2)}, image(None), "a.weight"),
    "adaptive pool": (lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 2)), {"a": conv(3, 8), "b": conv(8, 2)}, image(None), "a.weight"),
    "interpolate": (lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2.0, mode="bilinear")), {"a": conv(3, 8), "b": conv(8, 2)}, image(None), "a.weight"),
    "padding": (lambda m, x: m.b(F.pad(m.a(x), (1, 1, 2, 0), mode="reflect")), {"a": conv(3, 8), "b": conv(8, 2)}, image(None), "a.weight"),
    "zero padding": (lambda m, x: m.b(F.pad(m.a(x), (1, 1))), {"a": conv(3, 8), "b": conv(8, 2)}, image(None), "a.weight"),
    "mean": (lambda m, x: m.b(m.a(x).mean((2, 3))), {"a": conv(3, 8), "b": linear(8, 2)}, image(None), "a.weight"),
    "sum": (lambda m, x: m.b(m.a(x).sum(1)), {"a": linear(6, 8), "b": linear(8, 2)}, tokens(), "a.weight"),
    "softmax": (lambda m, x: m.b(m.a(x).softmax(1)), {"a": linear(6, 8), "b": linear(8, 2)}, tokens(), "a.weight"),
    # attention
    "rotary": (rotary, {n: linear(6, 16) for n in "qkv"} | {"b": linear(16, 2)}, tokens(), "v.weight"),
    "multi-query": (multi_query, {"q": linear(6, 16), "k": linear(6, 4), "v": linear(6, 4), "b": linear(16, 2)}, tokens(), "q.weight"),
    # others
    "squeeze-excite": (excited, {"a": conv(3, 8), "down": conv(8, 4, 1), "up": conv(4, 8, 1), "b": conv(8, 2)}, image(None), "up.weight"),
    "embedding": (lambda m, x: m.b(m.a(x)), {"a": nn.Embedding(11, 8), "b": linear(8, 2)}, torch.randint(0, 11, (2, 5)), "a.weight"),
    "embedding bag": (lambda m, x: m.b(m.a(x)), {"a": nn.EmbeddingBag(11, 8), "b": linear(8, 2)}, torch.randint(0, 11, (2, 5)), "a.weight"),
    "lstm": (lambda m, x: m.b(m.a(x)[0]), {"a": nn.LSTM(6, 8, batch_first=True), "b": linear(8, 2)}, tokens(), "a.weight_hh_l0"),
    "gru": (lambda m, x: m.b(m.a(x)[0]), {"a": nn.GRU(6, 8, batch_first=True), "b": linear(8, 2)}, tokens(), "a.weight_hh_l0"),
    "called twice": (lambda m, x: m.b(m.a(m.a(x).relu())), {"a": linear(6, 6), "b": linear(6, 2)}, tokens(), None),
    "weight norm": (lambda m, x: m.b(m.a(x)), {"a": parametrizations.weight_norm(conv(3, 8)), "b": conv(8, 2)}, image(None), "a.parametrizations.weight.original1"),
}  # fmt: skip
KINDS = ("channel", "neuron", "head", "head_dim", "width")


@pytest.mark.parametrize("case", CASES)
def test_operation(case: str):
    torch.manual_seed(0)
    forward, layers, example, shrinks = CASES[case]
    model = Net(forward, **layers).eval()
    before = {name: p.numel() for name, p in model.named_parameters()}
    if shrinks is None:
        graph = trace(model, example)
        assert not graph.unknown
        for group in graph.units():  # whatever can be cut is cut right
            plan = make_plan(graph, model, {group.id: [0]})
            assert difference(model, cut(model, plan), graph, graph.flags({group.id: [0]}), example) < 1e-5
        return
    smaller, plan = prune_channels(model, example, 0.5, kinds=KINDS)
    after = {name: p.numel() for name, p in smaller.named_parameters()}
    assert after[shrinks] <= 0.76 * before[shrinks], plan.skipped
    again = cut(Net(forward, **layers), Plan.from_json(plan.to_json()))
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in smaller.named_parameters()}


def test_a_forward_that_reads_values_is_traced_on_real_tensors_and_says_so():
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.b(m.a(x) if x.sum().item() > -1e9 else m.a(-x))

    graph = trace(Net(forward, a=linear(6, 8), b=linear(8, 2)).eval(), tokens())
    assert any("traced on real tensors" in note for note in graph.notes)
    assert graph.units("neuron")[0].units == 8


def test_numbers_of_the_forward_itself_need_no_real_tensors():
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.b(m.a(x) if bool((torch.arange(x.shape[1]) >= 0).all()) else x)

    graph = trace(Net(forward, a=linear(6, 8), b=linear(8, 2)).eval(), tokens())
    assert not graph.notes


def test_a_changed_output_shape_is_refused():
    model = Net(lambda m, x: m.b(m.a(x)), a=linear(6, 8), b=linear(8, 4)).eval()
    graph = trace(model, tokens())
    wrong = nn.Sequential(linear(6, 8), linear(8, 3)).eval()
    with pytest.raises(ModelError, match="changed the output's shape"):
        difference(model, wrong, graph, graph.flags({}), tokens())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_are_as_far_off_as_can_be_but_where_both_are(value):
    model = Net(lambda m, x: (m.b(m.a(x)), x), a=linear(6, 8), b=linear(8, 4)).eval()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.b.bias[1] = value
    graph = trace(model, tokens())
    assert difference(model, broken, graph, graph.flags({}), tokens()) == torch.inf
    again = trace(broken, tokens())
    assert difference(broken, copy.deepcopy(broken), again, again.flags({}), x := tokens()) < 1e-5
    assert difference(broken, model, again, again.flags({}), x) == torch.inf
