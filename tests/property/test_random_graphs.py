"""Random networks of residuals, concatenations, splits, groups, attention and reshapes: cut, and compared with the original.

Two independent oracles: the masked original, operation by operation, and, where no normalisation mixes channels, the original
with every removed slice of every parameter set to zero. SECATEUR_GRAPHS sets how many networks are tried.
"""

from __future__ import annotations

import copy
import os
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.graph import choose_groups, cut, difference, make_plan, select, trace, unit_scores

GRAPHS = int(os.environ.get("SECATEUR_GRAPHS", "60"))
KINDS = ("channel", "neuron", "head", "head_dim", "width")


class Block(nn.Module):
    """One random piece: images ``[batch, c, 8, 8]`` in, images of `out` channels out."""

    mixes = False  #: whether a normalisation takes statistics over channels
    fixed_zero = False  #: whether a removed slice set to zero gives another result than its removal

    def __init__(self, c: int, r: random.Random):
        super().__init__()
        self.out = c


class Conv(Block):
    def __init__(self, c, r):
        super().__init__(c, r)
        groups = r.choice([g for g in (1, 1, 1, 2, 4, c) if c % g == 0])
        self.out = groups * r.randint(1, 3) if groups == c else groups * r.randint(2, 5)
        self.conv = nn.Conv2d(c, self.out, r.choice([1, 3]), padding="same", groups=groups, bias=r.random() < 0.5)
        self.norm = nn.BatchNorm2d(self.out) if r.random() < 0.6 else nn.Identity()
        if isinstance(self.norm, nn.BatchNorm2d):
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)
            nn.init.normal_(self.norm.bias)
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class Transposed(Block):
    def __init__(self, c, r):
        super().__init__(c, r)
        groups = r.choice([g for g in (1, 2) if c % g == 0])
        self.out = groups * r.randint(2, 6)
        self.conv = nn.ConvTranspose2d(c, self.out, 3, padding=1, groups=groups)

    def forward(self, x):
        return torch.tanh(self.conv(x))


class GroupNormed(Block):
    mixes = True

    def __init__(self, c, r):
        super().__init__(c, r)
        self.norm = nn.GroupNorm(r.choice([g for g in (1, 2, 4) if c % g == 0]), c)

    def forward(self, x):
        return self.norm(x)


class Residual(Block):
    def __init__(self, c, r):
        super().__init__(c, r)
        inner = r.randint(3, 9)
        self.a, self.b = nn.Conv2d(c, inner, 3, padding=1), nn.Conv2d(inner, c, 1)

    def forward(self, x):
        return x + self.b(F.gelu(self.a(x)))


class OptionA(Block):
    def __init__(self, c, r):
        super().__init__(c, r)
        self.low, self.high = r.randint(0, 3), r.randint(1, 3)
        self.out = c + self.low + self.high
        self.conv = nn.Conv2d(c, self.out, 3, padding=1)

    def forward(self, x):
        return F.relu(self.conv(x) + F.pad(x, (0, 0, 0, 0, self.low, self.high)))


class Dense(Block):
    def __init__(self, c, r):
        super().__init__(c, r)
        grow = r.randint(2, 6)
        self.out = c + grow
        self.conv = nn.Conv2d(c, grow, 3, padding=1)

    def forward(self, x):
        return torch.cat([self.conv(x), x], 1)


class Parts(Block):
    """Halves go different ways and meet again, shuffled or not."""

    def __init__(self, c, r):
        super().__init__(c, r)
        self.even = c % 2 == 0
        self.shuffle = r.random() < 0.5
        half = c // 2 if self.even else c
        self.conv = nn.Conv2d(half, half, 3, padding=1)

    def forward(self, x):
        if not self.even:
            return self.conv(x)
        a, b = x.chunk(2, 1)
        y = torch.cat([a, F.relu(self.conv(b))], 1)
        if self.shuffle:
            n, c, h, w = y.shape
            y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return y


class Sections(Block):
    """Parts of the sizes an attribute says."""

    def __init__(self, c, r):
        super().__init__(c, r)
        first, second = r.randint(2, 5), r.randint(2, 5)
        self.sizes = [first, second]
        self.up = nn.Conv2d(c, first + second, 1)
        self.one, self.two = nn.Conv2d(first, c, 1), nn.Conv2d(second, c, 3, padding=1)

    def forward(self, x):
        a, b = torch.split(self.up(x), self.sizes, dim=1)
        return self.one(a) * torch.sigmoid(self.two(b))


class Gate(Block):
    """Squeeze and excite."""

    def __init__(self, c, r):
        super().__init__(c, r)
        self.down, self.up = nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Gated(Block):
    def __init__(self, c, r):
        super().__init__(c, r)
        self.up, self.down = nn.Conv2d(c, 12, 1), nn.Conv2d(6, c, 1)

    def forward(self, x):
        return self.down(F.glu(self.up(x), 1))


class Shuffled(Block):
    """Channels to space and back."""

    def __init__(self, c, r):
        super().__init__(c, r)
        self.up = nn.Conv2d(c, 4 * 5, 1)
        self.down = nn.Conv2d(5, c, 2, stride=2)

    def forward(self, x):
        return self.down(F.pixel_shuffle(self.up(x), 2))


class Direct(Block):
    """Parameters used without a module."""

    def __init__(self, c, r):
        super().__init__(c, r)
        self.scale, self.shift = nn.Parameter(torch.rand(c) + 0.5), nn.Parameter(torch.randn(1, c, 1, 1))

    def forward(self, x):
        return x * self.scale[:, None, None] + self.shift


class Attention(Block):
    """Heads over positions, grouped queries, by hand or by the kernel."""

    def __init__(self, c, r):
        super().__init__(c, r)
        self.heads, self.groups, self.dim = r.choice([1, 2, 3]), r.choice([1, 2]), r.choice([2, 4])
        self.q = nn.Linear(c, self.heads * self.groups * self.dim)
        self.kv = nn.Linear(c, 2 * self.heads * self.dim)
        self.o = nn.Linear(self.heads * self.groups * self.dim, c)
        self.kernel = r.random() < 0.5

    def forward(self, x):
        b, _, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        q = self.q(t).view(b, h * w, -1, self.dim).transpose(1, 2)
        k, v = self.kv(t).view(b, h * w, 2, -1, self.dim).permute(2, 0, 3, 1, 4)
        k, v = (y[:, :, None].expand(-1, -1, self.groups, -1, -1).flatten(1, 2) for y in (k, v))
        if self.kernel:
            y = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        else:
            y = (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v
        y = self.o(y.transpose(1, 2).reshape(b, h * w, -1))
        return x + y.transpose(1, 2).reshape(b, -1, h, w)


class Tokens(Block):
    """Layer norm and a feed-forward network over channels."""

    mixes = True

    def __init__(self, c, r):
        super().__init__(c, r)
        self.norm, self.up, self.down = nn.LayerNorm(c), nn.Linear(c, 10), nn.Linear(10, c)

    def forward(self, x):
        t = x.permute(0, 2, 3, 1)
        return (t + self.down(F.silu(self.up(self.norm(t))))).permute(0, 3, 1, 2)


class Again(Block):
    """One module called twice."""

    def __init__(self, c, r):
        super().__init__(c, r)
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.relu(self.conv(x)))


class Rows(Block):
    """A recurrent network along one spatial dimension."""

    def __init__(self, c, r):
        super().__init__(c, r)
        self.out = 6
        self.rnn = r.choice([nn.GRU, nn.LSTM])(c, 6, batch_first=True)

    def forward(self, x):
        b, c, h, w = x.shape
        y, _ = self.rnn(x.permute(0, 2, 3, 1).reshape(b * h, w, c))
        return y.reshape(b, h, w, -1).permute(0, 3, 1, 2)


BLOCKS = [
    Conv, Conv, Conv, Transposed, GroupNormed, Residual, OptionA, Dense, Parts, Sections, Gate, Gated,
    Shuffled, Direct, Attention, Tokens, Again, Rows,
]  # fmt: skip


class Network(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        r = random.Random(seed)
        torch.manual_seed(seed)
        c = r.choice([4, 6, 8, 12])
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        blocks = []
        for _ in range(r.randint(1, 6)):
            blocks.append(r.choice(BLOCKS)(c, r))
            c = blocks[-1].out
        self.blocks = nn.ModuleList(blocks)
        self.flat = r.random() < 0.3
        self.head = nn.Linear(c * 4 if self.flat else c, 3)
        self.mixes = any(b.mixes for b in blocks)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = F.adaptive_avg_pool2d(x, 2).flatten(1) if self.flat else x.mean((2, 3))
        return self.head(x)


def zeroed(model: nn.Module, plan) -> nn.Module:
    """The original with every slice that the plan removes set to zero."""
    model = copy.deepcopy(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for c in plan.cuts:
            gone = torch.ones(tensors[c.tensor].shape[c.dim], dtype=torch.bool)
            gone[list(c.kept)] = False
            tensors[c.tensor].index_fill_(c.dim, gone.nonzero().flatten(), 0)
    return model


@pytest.mark.parametrize("seed", range(GRAPHS))
def test_random_network(seed):
    r = random.Random(seed)
    smaller = check(Network(seed).eval(), r)
    check(smaller, r)


def check(model: nn.Module, r: random.Random) -> nn.Module:
    """Cut some of `model`, compare, and return what is left."""
    x = torch.randn(2, 3, 8, 8)
    graph = trace(model, x)
    assert not graph.unknown
    kinds = tuple(k for k in KINDS if r.random() < 0.7) or KINDS
    groups = choose_groups(graph, kinds)
    removed = select(graph, groups, unit_scores(model, groups, lambda name, w: torch.rand_like(w)), r.choice([0.3, 0.5, 0.7]))
    plan = make_plan(graph, model, removed)
    smaller = cut(model, plan)
    assert difference(model, smaller, graph, graph.flags(removed), x) <= 1e-4
    if not model.mixes:
        with torch.no_grad():
            expected, found = zeroed(model, plan)(x), smaller(x)
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert sum(p.numel() for p in smaller.parameters()) <= sum(p.numel() for p in model.parameters())
    return smaller


def test_most_random_networks_can_be_cut():
    cuttable = sum(bool(choose_groups(trace(Network(seed).eval(), torch.randn(2, 3, 8, 8)), KINDS)) for seed in range(20))
    assert cuttable >= 18
