"""Input norms of every kind of layer against explicit unfolding, or against what the weight really multiplies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.data.batches import Batches
from secateur.errors import LayerError
from secateur.layers import find_layers
from secateur.stats import collect
from secateur.types import Need

CONVS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (5, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding=2, dilation=2), (5, 4, 7, 6)),
    (nn.Conv2d(4, 6, (3, 2), groups=2, bias=False), (5, 4, 7, 6)),
    (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (5, 4, 7, 6)),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (5, 4, 7, 6)),
    (nn.Conv2d(4, 6, 1, stride=(2, 3)), (5, 4, 7, 6)),
    (nn.Conv2d(4, 6, 1, padding=1, padding_mode="replicate"), (5, 4, 7, 6)),
    (nn.Conv3d(2, 3, 2, stride=2), (3, 2, 5, 4, 4)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2), (3, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (3, 4, 5, 4)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), (3, 4, 5, 4)),
    (nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3)),
]


def norms(model, data, **keywords):
    return {
        n: s.input_norm
        for n, s in collect(model, find_layers(model)[0], {Need.INPUT_NORM}, batches=Batches(data)).layers.items()
    }


def brute_force(module, x) -> torch.Tensor:
    """For each weight, the norm over outputs of what one unit of that weight alone adds to them."""
    found = torch.zeros_like(module.weight)
    with torch.no_grad():
        for index in range(module.weight.numel()):
            module.weight.zero_().view(-1)[index] = 1
            if module.bias is not None:
                module.bias.zero_()
            found.view(-1)[index] = module(x).norm()
    return found


@pytest.mark.parametrize(("module", "shape"), CONVS, ids=lambda v: str(v) if isinstance(v, nn.Module) else "")
def test_convolutions_of_every_kind(module, shape):
    x = torch.randn(shape)
    layer = find_layers(module)[0]["weight"]
    found = norms(module, [x[:1], x[1:]])["weight"]
    torch.testing.assert_close(found.expand(layer.shape), layer.canonical(brute_force(module, x)), rtol=1e-5, atol=1e-6)


def test_ungrouped_norms_hold_one_row():
    found = norms(nn.Conv2d(4, 6, 3), [torch.randn(2, 4, 5, 5)])["weight"]
    assert found.shape == (1, 4, 3, 3)


def test_linear_sums_over_every_position():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(5, 7, 4)
    found = norms(model, [x[:2], x[2:]])
    torch.testing.assert_close(found["0.weight"], x.flatten(0, 1).norm(dim=0)[None])
    torch.testing.assert_close(found["1.weight"], model[0](x).detach().flatten(0, 1).norm(dim=0)[None])


def test_layers_that_read_one_tensor_which_changes_in_between():
    class Projections(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            x = x.clone()
            y = self.q(x) + self.k(x)
            return y + self.v(x.mul_(2))

    x = torch.randn(5, 7, 4)
    found = norms(Projections(), [x])
    expected = x.flatten(0, 1).norm(dim=0)[None]
    for name, factor in (("q.weight", 1), ("k.weight", 1), ("v.weight", 2)):
        torch.testing.assert_close(found[name], factor * expected)


def test_padding_is_left_out():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc, self.flat, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, input_ids, attention_mask):
            hidden = self.fc(self.embed(input_ids))
            hidden = self.flat(hidden.reshape(-1, 4)).view_as(hidden)
            return self.head(hidden[:, 0])

    model = Tokens()
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    found = norms(model, [{"input_ids": ids, "attention_mask": mask}])
    embedded = model.embed(ids)[mask.bool()].detach()
    torch.testing.assert_close(found["fc.weight"], embedded.norm(dim=0)[None])
    torch.testing.assert_close(found["flat.weight"], model.fc(embedded).detach().norm(dim=0)[None])
    shorter = norms(model, [{"input_ids": ids[:1, :3], "attention_mask": mask[:1, :3]}])
    alone = norms(model, [{"input_ids": ids[:1], "attention_mask": mask[:1]}])
    for name in alone:
        torch.testing.assert_close(alone[name], shorter[name])


def test_padding_that_cannot_be_told_apart_is_noted():
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.more = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x, attention_mask):
            half = x[:, ::2]
            return self.fc(half) + self.more(half)

    model = Pools()
    batch = {"x": torch.randn(2, 4, 4), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])}
    found = collect(model, find_layers(model)[0], {Need.INPUT_NORM}, batches=Batches([batch]))
    assert len(found.notes) == 1
    assert "'fc.weight', 'more.weight'" in found.notes[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_projections(batch_first):
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    query, key = torch.randn(3, 3, 8), torch.randn(3, 3, 8)

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = module

        def forward(self, x):
            return self.attention(x, key, value=2 * key, need_weights=False)[0]

    found = norms(Cross(), [query])
    parts = torch.stack([t.reshape(-1, 8).norm(dim=0) for t in (query, key, 2 * key)]).repeat_interleave(8, 0)
    torch.testing.assert_close(found["attention.in_proj_weight"], parts)
    captured = []
    with torch.no_grad():
        out = module(query, key, 2 * key)[0]
        inputs = torch.linalg.solve(module.out_proj.weight, (out - module.out_proj.bias).reshape(-1, 8).t()).t()
        captured.append(inputs.norm(dim=0)[None])
    torch.testing.assert_close(found["attention.out_proj.weight"], captured[0], rtol=1e-3, atol=1e-4)


def test_self_attention_inside_a_transformer_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 3, 8)
    found = norms(layer, [x])
    widths = {n.removesuffix(".weight"): v.shape[1] for n, v in found.items()}
    assert widths == {"self_attn.in_proj_weight": 8, "self_attn.out_proj": 8, "linear1": 8, "linear2": 16}
    torch.testing.assert_close(found["self_attn.in_proj_weight"], x.reshape(-1, 8).norm(dim=0)[None])


def test_attention_with_its_own_key_and_value_sizes():
    module = nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True)

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = module

        def forward(self, x):
            return self.attention(x, x[..., :5], x[..., :3])[0]

    x = torch.randn(2, 3, 8)
    found = norms(Cross(), [x])
    expected = x.reshape(-1, 8).norm(dim=0)[None]
    torch.testing.assert_close(found["attention.k_proj_weight"], expected[:, :5])
    torch.testing.assert_close(found["attention.v_proj_weight"], expected[:, :3])


def test_recurrent_cells_and_what_no_hook_can_see():
    class Steps(nn.Module):
        def __init__(self, cell):
            super().__init__()
            self.cell = cell

        def forward(self, x):
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return state[0] if isinstance(state, tuple) else state

    x = torch.randn(3, 2, 4)
    for cell in (nn.GRUCell(4, 5), nn.LSTMCell(4, 5), nn.RNNCell(4, 5)):
        found = norms(Steps(cell), [x])
        first = cell(x[:, 0])
        first = first[0] if isinstance(first, tuple) else first
        torch.testing.assert_close(found["cell.weight_ih"], x.reshape(-1, 4).norm(dim=0)[None])
        torch.testing.assert_close(found["cell.weight_hh"], first.detach().norm(dim=0)[None])
    with pytest.raises(LayerError, match=r"weight_hh_l0.*LSTM.*ignore="):
        norms(nn.LSTM(4, 5), [x])
    lstm = nn.LSTM(4, 5, batch_first=True)
    layers, _ = find_layers(lstm, layers=["weight_ih_l0"])
    found = collect(lstm, layers, {Need.INPUT_NORM}, batches=Batches([x])).layers["weight_ih_l0"]
    torch.testing.assert_close(found.input_norm, x.reshape(-1, 4).norm(dim=0)[None])


def test_a_convolution_with_a_forward_of_its_own():
    class Same(nn.Conv2d):
        """Pads by itself, as converted TensorFlow models do."""

        def forward(self, x):
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, 1, self.groups)

    for groups in (1, 4):
        module, x = Same(4, 8, 3, stride=2, groups=groups), torch.randn(5, 4, 6, 6)
        found = norms(module, [x])["weight"]
        torch.testing.assert_close(found.expand(module.weight.shape), brute_force(module, x), rtol=1e-5, atol=1e-6)


def test_a_convolution_that_transforms_its_weight_is_refused():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(weight, None, None, training=True).view_as(self.weight)
            return F.conv2d(x, weight, self.bias)

    with pytest.raises(LayerError, match="Standardised transforms its weight"):
        norms(nn.Sequential(Standardised(2, 3, 3)), [torch.randn(2, 2, 5, 5)])


def test_gpt2s_transposed_linear_layer():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model, x = nn.Sequential(pytorch_utils.Conv1D(3, 4)), torch.randn(2, 5, 4)
    torch.testing.assert_close(norms(model, [x])["0.weight"], x.reshape(-1, 4).norm(dim=0)[None])


def test_large_and_small_features_are_summed_exactly():
    x = torch.cat([torch.full((1, 1), 4096.0), torch.full((4096, 1), 1.0)])
    assert norms(nn.Linear(1, 2), [x[i : i + 64] for i in range(0, len(x), 64)])["weight"].item() == pytest.approx(
        (4096.0**2 + 4096) ** 0.5, rel=1e-7
    )
    assert norms(nn.Linear(1, 2), [torch.full((8, 1), 1e25)])["weight"].item() == pytest.approx(1e25 * 8**0.5, rel=1e-6)
