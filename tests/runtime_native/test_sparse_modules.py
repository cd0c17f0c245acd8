from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from secateur.errors import LayerError
from secateur.runtime import SparseConv2d, SparseLinear
from secateur.runtime.modules import DepthwiseConv2d


def pruned(module: nn.Module, sparsity: float = 0.8) -> nn.Module:
    with torch.no_grad():
        module.weight *= torch.rand_like(module.weight) >= sparsity
    return module.requires_grad_(False)


def linear(**options) -> tuple[nn.Linear, SparseLinear, torch.Tensor]:
    dense = pruned(nn.Linear(70, 40))
    return dense, SparseLinear.from_dense(dense.weight, dense.bias, **options), torch.randn(3, 9, 70)


CONVS = [
    {"in_channels": 6, "out_channels": 10, "kernel_size": 3, "padding": 1},
    {"in_channels": 6, "out_channels": 9, "kernel_size": (3, 5), "stride": (2, 1), "padding": "valid", "groups": 3},
    {"in_channels": 4, "out_channels": 8, "kernel_size": 5, "padding": "same", "dilation": 2, "bias": False},
    {"in_channels": 12, "out_channels": 8, "kernel_size": 1},
    {"in_channels": 4, "out_channels": 4, "kernel_size": (2, 4), "padding": "same"},
]


@pytest.mark.parametrize("options", [{}, {"kernel": "bitmask"}, {"activation": "gelu"}, {"activation": "silu"}])
def test_linear_layer(options):
    dense, layer, x = linear(**options)
    expected = dense(x)
    if "activation" in options:
        expected = getattr(nn.functional, options["activation"])(expected)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.weight, dense.weight)


@pytest.mark.parametrize("options", CONVS)
def test_convolution_layer(options):
    dense = pruned(nn.Conv2d(**options))
    layer = SparseConv2d.from_conv(dense)
    x = torch.randn(2, options["in_channels"], 14, 19)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x[0]), dense(x[0]), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.weight, dense.weight)


@pytest.mark.parametrize("options", [{}, {"kernel": "bitmask"}, {"kernel": "bitmask", "values": torch.int8}])
def test_copy_and_state_without_pickle(options):
    from safetensors.torch import load, save

    _, layer, x = linear(**options)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    state = load(save(layer.state_dict()))
    assert set(state) == {"bias", "bits", "values"}
    fresh = SparseLinear(70, 40, **options)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), expected)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(fresh(x), expected)


def test_a_broken_state_is_refused():
    _, layer, _ = linear()
    state = dict(layer.state_dict())
    for change, words in [
        ({"bits": state["bits"][:-1]}, "bitmask"),
        ({"values": state["values"][:-1]}, "values"),
        ({"bits": None}, "Missing"),
    ]:
        broken = {k: v for k, v in {**state, **change}.items() if v is not None}
        with pytest.raises(RuntimeError, match=words):
            SparseLinear(70, 40).load_state_dict(broken)


def test_a_layer_inside_a_model_keeps_its_state_apart():
    _, layer, x = linear()
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(40, 2))
    assert {"0.bits", "0.values", "0.bias", "2.weight", "2.bias"} == set(model.state_dict())
    other = nn.Sequential(SparseLinear(70, 40), nn.ReLU(), nn.Linear(40, 2))
    other.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(other(x), model(x))


def test_operators_pass_their_own_checks():
    from secateur.runtime import ops

    _, layer, x = linear()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.sparse_linear, (x, layer.program, layer.bias, 40, 0), test_utils=tests)
    _, masked, _ = linear(kernel="bitmask")
    torch.library.opcheck(ops.sparse_matvec, (x, masked.program, None, 40, 1), test_utils=tests)
    conv = SparseConv2d.from_conv(pruned(nn.Conv2d(4, 6, 3, stride=2, padding=1)))
    args = (torch.randn(2, 4, 9, 9), conv.program, conv.bias, 6, [3, 3, 2, 2, 1, 1, 1, 1, 1, 1], 0)
    torch.library.opcheck(ops.sparse_conv2d, args, test_utils=tests)
    depthwise = (torch.randn(2, 4, 9, 9), torch.randn(4, 1, 3, 3), None, [3, 3, 1, 1, 1, 1, 1, 1, 0, 2], 4)
    torch.library.opcheck(ops.depthwise_conv2d, depthwise, test_utils=tests)


def test_compile_and_export_pass_through():
    conv = SparseConv2d.from_conv(pruned(nn.Conv2d(3, 8, 3, stride=2)))
    _, layer, _ = linear()
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 70), layer).eval().requires_grad_(False)
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    program = torch.export.export(model, (x,))
    assert sum("secateur" in str(node.target) for node in program.graph.nodes) == 2
    torch.testing.assert_close(program.module()(x), expected)


def test_what_cannot_be_is_refused():
    _, layer, x = linear()
    with pytest.raises(LayerError, match="reflect"):
        SparseConv2d.from_conv(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(LayerError, match="one group"):
        SparseConv2d((4, 4, 3, 3), groups=0)
    with pytest.raises(LayerError, match="depthwise"):
        DepthwiseConv2d((4, 2, 3, 3))
    with pytest.raises(LayerError, match="activations"):
        SparseLinear(3, 3, activation="tanh")
    with pytest.raises(LayerError, match="bitmask"):
        SparseLinear(3, 3, values=torch.int8)
    with pytest.raises(LayerError, match="cannot hold"):
        layer.load_dense(torch.zeros(3, 3), torch.zeros(3))
    with pytest.raises(LayerError, match="float32"):
        layer(x.half())
    with pytest.raises(LayerError, match="float32 activations on the CPU"):
        layer(x.to("meta"))
    assert f"density={float((layer.weight != 0).float().mean()):.3f}" in repr(layer)
