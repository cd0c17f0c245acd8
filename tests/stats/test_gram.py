"""Gram matrices against explicit unfolding: for any change of the weight they must give the output's squared change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.data.batches import Batches
from secateur.errors import DataError, LayerError, NonFiniteError
from secateur.layers import find_layers
from secateur.stats import collect
from secateur.types import Need


def grams(model, data, **keywords):
    layers = find_layers(model)[0]
    return {n: s.gram for n, s in collect(model, layers, {Need.GRAM}, batches=Batches(data), **keywords).layers.items()}


def form(gram: torch.Tensor, change: torch.Tensor) -> float:
    """What the Gram matrix says of the squared output error of a change of the canonical weight."""
    rows = change.reshape(len(gram), len(change) // len(gram), -1).double()
    return float((rows @ gram.double() * rows).sum())


class Same(nn.Conv2d):
    """Pads by itself, as converted TensorFlow models do."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, 1, self.groups)


CONVS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (5, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding=2, dilation=2), (5, 4, 7, 6)),
    (nn.Conv2d(4, 6, (3, 2), groups=2, stride=(1, 2), bias=False), (5, 4, 7, 6)),
    (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (5, 4, 7, 6)),
    (nn.Conv2d(4, 8, (2, 4), padding="same"), (5, 4, 7, 6)),
    (nn.Conv2d(4, 8, 2, padding="valid"), (5, 4, 7, 6)),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (5, 4, 7, 6)),
    (nn.Conv3d(2, 3, 2, stride=2), (3, 2, 5, 4, 4)),
    (Same(4, 8, 3, stride=2, groups=4), (5, 4, 6, 6)),
]


@pytest.mark.parametrize(("module", "shape"), CONVS, ids=lambda v: str(v) if isinstance(v, nn.Module) else "")
def test_convolutions_of_every_kind(module, shape):
    x = torch.randn(shape)
    gram = grams(module, [x[:1], x[1:]])["weight"]
    assert gram.dtype == torch.float32
    assert gram.shape == (module.groups, module.weight[0].numel(), module.weight[0].numel())
    for _ in range(3):
        change = torch.randn_like(module.weight)
        before = module(x).detach()
        with torch.no_grad():
            module.weight += change
        error = float((module(x).detach() - before).double().square().sum())
        assert form(gram, change) == pytest.approx(error, rel=1e-4)


def test_very_many_positions_are_sampled_evenly(monkeypatch):
    from secateur.stats import gram as module

    x = torch.randn(3, 2, 40, 40)
    conv = nn.Conv2d(2, 3, 3)
    full = grams(conv, [x])["weight"]
    monkeypatch.setattr(module, "_MOST_POSITIONS", 700)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)  # one sample a chunk
    sampled = grams(conv, [x])["weight"]
    assert float(sampled.diagonal(dim1=1, dim2=2).sum() / full.diagonal(dim1=1, dim2=2).sum()) == pytest.approx(1, abs=0.1)
    patches = F.unfold(x, 3).transpose(1, 2).reshape(-1, 18)
    taken = patches[:: -(-len(patches) // 700)]
    torch.testing.assert_close(sampled[0], taken.t() @ taken * len(patches) / len(taken), rtol=1e-4, atol=1e-2)


class Block(nn.Module):
    """Query, key and value of one tensor; an output projection of another; `late` sees the first again."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o, self.late = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x):
        mixed = self.o(self.q(x) + self.k(x) * self.v(x))
        return mixed + self.late(x + 0) if len(x) == 2 else mixed + self.late(x)


def test_layers_that_share_an_input_share_its_matrix():
    x = torch.randn(3, 5, 4)
    found = grams(Block(), [x])
    assert found["q.weight"] is found["k.weight"] is found["v.weight"] is found["late.weight"]
    assert found["o.weight"] is not found["q.weight"]
    torch.testing.assert_close(found["q.weight"][0], x.reshape(-1, 4).t() @ x.reshape(-1, 4))


def test_layers_that_share_only_some_inputs_do_not_share_a_matrix():
    """In batches of 2 `late` is given a copy: the sums are right all the same, and q, k, v still share."""
    x = torch.randn(5, 5, 4)
    found = grams(Block(), [x[:3], x[3:]])
    assert found["q.weight"] is found["v.weight"] is not found["late.weight"]
    for name in ("q.weight", "late.weight"):
        torch.testing.assert_close(found[name][0], x.reshape(-1, 4).t() @ x.reshape(-1, 4))


def test_an_input_changed_in_place_is_another_input():
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x.clone()
            return self.a(x) + self.b(x.mul_(2))

    x = torch.randn(6, 4)
    found = grams(Doubles(), [x])
    torch.testing.assert_close(found["b.weight"], 4 * found["a.weight"])


def test_a_module_called_twice_sums_both_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) + self.fc(x)

    x = torch.randn(6, 4)
    torch.testing.assert_close(grams(Twice(), [x])["fc.weight"][0], 2 * x.t() @ x)


def test_padding_is_left_out():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask):
            return self.fc(self.embed(input_ids))

    model, ids = Tokens(), torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    real = model.embed(ids)[mask.bool()].detach()
    torch.testing.assert_close(grams(model, [{"input_ids": ids, "attention_mask": mask}])["fc.weight"][0], real.t() @ real)
    nothing = Batches([{"input_ids": ids, "attention_mask": 0 * mask}])
    with pytest.raises(DataError, match="batch 0 of the data is all padding"):
        collect(model, find_layers(model)[0], {Need.GRAM}, batches=nothing)


def test_attention_and_gram_beside_norms():
    """Two kinds of statistics at once, some of which call the module again: neither must count the other's calls."""
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8)
    found = collect(layer, find_layers(layer)[0], {Need.GRAM, Need.INPUT_NORM}, batches=Batches([x])).layers
    for stats in found.values():
        torch.testing.assert_close(stats.gram[0].diagonal().sqrt(), stats.input_norm[0])
    conv = nn.Conv2d(4, 6, 3, groups=2)
    stats = collect(conv, find_layers(conv)[0], {Need.GRAM, Need.INPUT_NORM}, batches=Batches([torch.randn(2, 4, 6, 6)])).layers
    diagonal = stats["weight"].gram.diagonal(dim1=1, dim2=2).sqrt().repeat_interleave(3, 0)
    torch.testing.assert_close(diagonal.reshape(6, 2, 3, 3), stats["weight"].input_norm)


def test_cross_attention_has_three_inputs():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x[:, :2], 2 * x[:, :2])[0]

    x = torch.randn(2, 3, 8)
    gram = grams(Cross(), [x])["attention.in_proj_weight"]
    inputs = (x, x[:, :2], 2 * x[:, :2])
    torch.testing.assert_close(gram, torch.stack([t.reshape(-1, 8).t() @ t.reshape(-1, 8) for t in inputs]))


def test_gpt2s_transposed_linear_layer():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model, x = nn.Sequential(pytorch_utils.Conv1D(3, 4)), torch.randn(2, 5, 4)
    torch.testing.assert_close(grams(model, [x])["0.weight"][0], x.reshape(-1, 4).t() @ x.reshape(-1, 4))


def test_half_precision_does_not_overflow_and_sums_do_not_drift():
    x = torch.full((8, 1), 300.0, dtype=torch.float16)
    assert grams(nn.Linear(1, 2).half(), [x])["weight"].item() == 8 * 300.0**2
    x = torch.cat([torch.full((1, 1), 4096.0), torch.full((4096, 1), 1.0)])
    found = grams(nn.Linear(1, 2), [x[i : i + 64] for i in range(0, len(x), 64)])["weight"].item()
    assert found == pytest.approx(4096.0**2 + 4096, rel=1e-5), "plain float32 sums would lose all the ones"


def test_what_has_no_gram_matrix_is_refused_by_name():
    with pytest.raises(LayerError, match=r"weight_hh_l0.*LSTM.*ignore="):
        grams(nn.LSTM(4, 5), [torch.randn(3, 2, 4)])
    with pytest.raises(LayerError, match=r"'weight'.*ConvTranspose2d"):
        grams(nn.ConvTranspose2d(2, 3, 3), [torch.randn(1, 2, 5, 5)])
    wide = nn.Linear(10**7, 1)
    with pytest.raises(LayerError, match=r"'weight', shape .*GB"):
        grams(wide, [torch.randn(1, 10**7)])


def test_a_convolution_that_transforms_its_weight_is_refused():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight * 2, self.bias)

    with pytest.raises(LayerError, match="Scaled transforms its weight"):
        grams(nn.Sequential(Scaled(2, 3, 3)), [torch.randn(2, 2, 5, 5)])


def test_activations_that_are_not_finite_are_named():
    class Explodes(nn.Module):
        def forward(self, x):
            return x / 0

    with pytest.raises(NonFiniteError, match=r"batch 0.*'0'.*Explodes"):
        grams(nn.Sequential(Explodes(), nn.Linear(4, 2)), [torch.randn(3, 4)])
