from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from resnet20 import untrained
from torch import nn

from secateur.errors import ModelError
from secateur.measure.macs import macs


def zero_first(weight: torch.Tensor, count: int) -> None:
    with torch.no_grad():
        weight.view(-1)[:count] = 0


def brute_conv_macs(weight: torch.Tensor, out: torch.Tensor) -> tuple[int, int]:
    """All products of a convolution and those with a nonzero weight, counted one output value at a time."""
    dense = nonzero = 0
    for _sample in range(out.shape[0]):
        for channel in range(out.shape[1]):
            for _position in range(out[0, 0].numel()):
                values = weight[channel].flatten().tolist()
                dense += len(values)
                nonzero += sum(v != 0 for v in values)
    return dense, nonzero


def test_linear_by_hand():
    model = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 3, bias=False))
    zero_first(model[0].weight, 35)
    got = macs(model, torch.randn(5, 10))
    assert got.dense == 5 * (70 + 21)
    assert got.nonzero == 5 * (35 + 21)
    assert [(x.name, x.calls, x.dense, x.nonzero) for x in got.layers] == [("0.weight", 1, 350, 175), ("2.weight", 1, 105, 105)]


@pytest.mark.parametrize("shape", [(10,), (2, 10), (2, 3, 10), (2, 3, 4, 10)])
def test_linear_on_any_leading_dimensions(shape):
    positions = torch.Size(shape[:-1]).numel()
    for bias in (True, False):
        assert macs(nn.Linear(10, 7, bias=bias), torch.randn(shape)).dense == positions * 70


@given(
    groups=st.sampled_from([1, 2, 4]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    zeros=st.integers(0, 15),
)
def test_convolutions_against_loops(groups, stride, padding, dilation, zeros):
    conv = nn.Conv2d(4, 8, (3, 2), stride, padding, dilation, groups=groups, bias=False)
    zero_first(conv.weight, zeros)
    x = torch.randn(2, 4, 7, 6)
    got = macs(conv, x)
    assert (got.dense, got.nonzero) == brute_conv_macs(conv.weight, conv(x))


def test_depthwise_and_one_dimensional_and_transposed_convolutions():
    assert macs(nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.randn(1, 8, 5, 5)).dense == 8 * 25 * 9
    assert macs(nn.Conv1d(3, 4, 5), torch.randn(2, 3, 12)).dense == 2 * 8 * 4 * 3 * 5
    assert macs(nn.Conv3d(2, 3, 2), torch.randn(1, 2, 4, 4, 4)).dense == 27 * 3 * 2 * 8
    transposed = nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2)
    assert (
        macs(transposed, torch.randn(1, 6, 5, 5)).dense == 25 * 6 * 2 * 9
    )  # each input value meets out/groups * kernel weights


def test_a_layer_called_twice_counts_twice_and_a_tied_one_under_its_first_name():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    model = Twice()
    zero_first(model.a.weight, 8)
    got = macs(model, torch.randn(3, 4))
    assert got.dense == 3 * 3 * 16
    assert got.nonzero == got.dense // 2
    assert [(x.name, x.calls) for x in got.layers] == [("a.weight", 3)]


@pytest.mark.parametrize("train", [True, False])
def test_a_transformer_layer_by_hand(train):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train(train)
    zero_first(layer.self_attn.in_proj_weight, 96)
    got = macs(layer, torch.randn(3, 5, 8))
    positions, attention = 3 * 5, 3 * 5 * 5 * (8 + 8)
    assert got.dense == positions * (3 * 64 + 64 + 2 * 128) + attention
    assert got.nonzero == got.dense - positions * 96
    assert {x.name for x in got.layers} == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    }
    assert layer.training is train
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_alone_counts_every_pair():
    class Attend(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True, is_causal=True)

    got = macs(Attend(), torch.randn(2, 4, 6, 8))
    assert got.dense == got.nonzero == 2 * 4 * 6 * 6 * (8 + 8)
    assert got.layers == ()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind):
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    model = kind(3, 5, num_layers=2, bidirectional=True)
    zero_first(model.weight_hh_l0, gates * 5)
    got = macs(model, torch.randn(7, 2, 3))
    per_position = 2 * gates * 5 * (3 + 5) + 2 * gates * 5 * (10 + 5)
    assert got.dense == 14 * per_position
    assert got.nonzero == got.dense - 14 * gates * 5


def test_bilinear():
    assert macs(TwoInputs(), {"left": torch.randn(6, 2), "right": torch.randn(6, 3)}).dense == 6 * 2 * 3 * 4


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Bilinear(2, 3, 4)

    def forward(self, left, right):
        return self.mix(left, right)


def test_autocast_copies_are_recognised():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x)

    model = Cast()
    zero_first(model.layer.weight, 12)
    assert macs(model, torch.randn(2, 4)).nonzero == 2 * 4


def test_weights_times_activations_in_either_order():
    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.eye(4))

        def forward(self, x):
            return self.w @ x

    got = macs(Left(), torch.randn(4, 6))
    assert (got.dense, got.nonzero) == (96, 24)


def test_known_figure_of_resnet20_and_nothing_left_behind():
    model = untrained().train()
    model.layer1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    got = macs(model, torch.randn(1, 3, 32, 32))
    assert got.dense == 40_551_040  # convolutions 40.55 M, as published, and 640 of the classifier
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not model.layer1.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_wrong_example_is_named():
    with pytest.raises(ModelError, match="does not run on the example"):
        macs(nn.Linear(3, 2), torch.randn(1, 4))
