from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from secateur.errors import ArtifactError, UnknownName
from secateur.runtime import RUNTIMES, SparseConv2d, SparseLinear, deploy, fold, load, native, save
from secateur.runtime.modules import DepthwiseConv2d
from secateur.runtime.pool import SlicedMaxPool2d


def prune(model: nn.Module, sparsity: float) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight *= torch.rand_like(module.weight) >= sparsity
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
    return model.eval()


class Net(nn.Module):
    """A residual block, a depthwise convolution, a BatchNorm that cannot be folded, and a wide linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.depth, self.bn3 = nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.BatchNorm2d(64)
        self.fc = nn.Linear(64 * 64, 512)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        y = self.depth(x)
        return self.fc((self.bn3(y) + y).flatten(2).transpose(1, 2).reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return prune(Net(), 0.9)


X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_layers_are_replaced_and_outputs_kept(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fast = deploy(net, X, seconds=0.02)
    assert fast.summary.error < 1e-5
    with torch.inference_mode():
        torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    layers = {layer.name: layer for layer in fast.summary.layers}
    assert set(layers) == {"conv1", "conv2", "depth", "fc"}
    assert layers["fc"].runtime == "panel"  # 90% of 2 million weights times 32 rows: about eight times faster
    assert isinstance(fast.fc, SparseLinear)
    assert layers["fc"].speedup > 1.05
    assert "depthwise" in layers["depth"].reason
    assert abs(layers["fc"].sparsity - 0.9) < 0.01


def test_only_private_batchnorms_are_folded(net):
    fast = deploy(net, X, seconds=0.02)
    assert fast.summary.folded == (("conv1", "bn1"), ("conv2", "bn2"))
    assert isinstance(fast.bn1, nn.Identity)
    assert isinstance(fast.bn3, nn.BatchNorm2d)


def test_fold_is_exact_up_to_rounding():
    layer, norm = nn.Conv2d(3, 5, 3), prune(nn.Sequential(nn.BatchNorm2d(5)), 0)[0]
    x = torch.randn(2, 3, 6, 6)
    expected = norm(layer(x))
    fold.fold(layer, norm)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_called_twice_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.conv(self.bn(self.conv(x)))

    assert fold.find_pairs(Twice().eval(), (torch.randn(1, 3, 2, 2),), {}, fold.is_foldable) == []


def test_copies_compile_save_and_load(net, tmp_path):
    fast = deploy(net, X, seconds=0.02)
    expected = fast(X)
    assert torch.equal(copy.deepcopy(fast)(X), expected)
    assert copy.deepcopy(fast).summary == fast.summary
    save(fast, tmp_path / "fast.safetensors")
    again = load(tmp_path / "fast.safetensors", Net())
    assert torch.equal(again(X), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["fast.safetensors"]
    torch.testing.assert_close(torch.compile(fast, backend="aot_eager")(X), expected)
    json.dumps(fast.summary.to_json())


def test_files_that_do_not_fit_are_refused(net, tmp_path):
    fast = deploy(net, X, seconds=0.02)
    save(fast, tmp_path / "fast.safetensors")
    with pytest.raises(ArtifactError, match="does not fit"):
        load(tmp_path / "fast.safetensors", nn.Linear(3, 3))
    (tmp_path / "noise").write_bytes(b"\xff" * 100)
    with pytest.raises(ArtifactError, match="cannot be read"):
        load(tmp_path / "noise", Net())


def test_a_dense_model_stays_as_it_is():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    fast = deploy(model, torch.randn(16, 64), seconds=0.01)
    assert {layer.runtime for layer in fast.summary.layers} == {"dense"}
    assert all("zero" in layer.reason for layer in fast.summary.layers)
    assert "dense" in str(fast.summary)


def test_a_bare_layer_can_be_deployed_and_loaded(tmp_path):
    layer = prune(nn.Sequential(nn.Linear(768, 768)), 0.95)
    x = torch.randn(64, 768)
    fast = deploy(layer, x, seconds=0.02)
    assert isinstance(fast[0], SparseLinear)
    bare = deploy(layer[0], x, seconds=0.02)
    assert bare.summary.error < 1e-5


def test_runtimes_can_be_chosen_and_refuse_with_reasons():
    model = prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 16)), 0.9)
    x = torch.randn(20, 3, 8, 8)
    with pytest.raises(UnknownName, match="panel"):
        deploy(model, x, runtimes=["panels"])
    fast = deploy(model, x, runtimes=["2:4", "bitmask"], seconds=0.01)
    reasons = [layer.reason for layer in fast.summary.layers]
    assert "CUDA" in reasons[0]
    assert "linear layers only" in reasons[0]
    assert "20 rows" in reasons[1]
    bf16 = copy.deepcopy(model).bfloat16()
    assert "float32" in deploy(bf16, x.bfloat16(), seconds=0.01).summary.layers[0].reason
    assert RUNTIMES["panel-4x1"].make().refuses(model[2], torch.randn(20, 288)).startswith("its zeros form no blocks")


class SamePadded(nn.Conv2d):
    """Pads with a module of its own, more at the end, as networks ported from TensorFlow do."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        return nn.functional.conv2d(self.pad(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Inverted(nn.Module):
    """Two layers behind which one and the same activation stands, the second of them depthwise with stride."""

    def __init__(self):
        super().__init__()
        self.expand, self.act = nn.Conv2d(16, 96, 1), nn.ReLU6()
        self.depth = SamePadded(96, 96, 3, stride=2, groups=96)
        self.project = nn.Conv2d(96, 16, 1)

    def forward(self, x):
        return self.project(self.act(self.depth(self.act(self.expand(x)))))


def test_a_shared_activation_goes_into_all_its_layers_or_none(tmp_path):
    model = prune(Inverted(), 0.9)
    with torch.no_grad():
        model.depth.weight.normal_()
    x = 9 * torch.randn(4, 16, 56, 56)
    fast = deploy(model, x, runtimes=["panel", "depthwise"], seconds=0.02)
    layers = {layer.name: layer for layer in fast.summary.layers}
    both = isinstance(fast.expand, SparseConv2d) and isinstance(fast.depth, DepthwiseConv2d)
    assert isinstance(fast.act, nn.Identity) == both
    assert [bool(layers[name].fused) for name in ("expand", "depth")] == [both, both]
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    alone = deploy(model, x, runtimes=["panel"], seconds=0.02)
    assert isinstance(alone.act, nn.ReLU6)  # it also serves the depthwise layer, which stays dense
    with torch.inference_mode():
        torch.testing.assert_close(alone(x), model(x), rtol=1e-4, atol=1e-4)
        save(fast, tmp_path / "fast.safetensors")
        assert torch.equal(load(tmp_path / "fast.safetensors", Inverted())(x), fast(x))


def test_padding_modules_inside_a_convolution_are_understood():
    conv = prune(nn.Sequential(SamePadded(32, 64, 3, stride=2)), 0.9)
    x = torch.randn(2, 32, 40, 40)
    assert RUNTIMES["panel"].make().refuses(conv[0], x) is None
    torch.testing.assert_close(SparseConv2d.from_conv(conv[0])(x), conv(x), rtol=1e-4, atol=1e-5)
    conv[0].pad = nn.ReflectionPad2d((0, 1, 0, 1))
    assert "computes something else" in RUNTIMES["panel"].make().refuses(conv[0], x)


def test_rounding_runtimes_are_tried_only_by_name():
    model = prune(nn.Sequential(nn.Linear(2048, 2048)), 0.7)
    x = torch.randn(1, 2048)
    assert not {"bitmask-bfloat16", "bitmask-int8"} & set(deploy(model, x, seconds=0.02).summary.layers[0].sparse_ms)
    fast = deploy(model, x, runtimes=["bitmask-int8"], seconds=0.02)
    assert fast[0].values == torch.int8
    assert 1e-4 < fast.summary.error < 0.05


def test_blocks_are_found_by_their_zeros():
    layer = nn.Linear(256, 64).requires_grad_(False)
    keep = (torch.rand(16, 256) >= 0.9).repeat_interleave(4, dim=0)
    layer.weight.mul_(keep)
    runtime, x = RUNTIMES["panel-4x1"].make(), torch.randn(50, 256)
    assert runtime.refuses(layer, x) is None
    torch.testing.assert_close(runtime.convert(layer)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_shared_and_uncalled_layers():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(512, 512)
            self.b, self.idle = self.a, nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x))

    model, x = prune(Shared(), 0.95), torch.randn(64, 512)
    fast = deploy(model, x, seconds=0.02)
    assert fast.a is fast.b
    assert isinstance(fast.a, SparseLinear)
    assert [layer.reason for layer in fast.summary.layers if layer.name == "idle"] == [
        "the example does not call it as a module"
    ]


def test_attention_projections_read_directly_stay_dense():
    model = prune(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 0.9)
    fast = deploy(model, torch.randn(4, 16, 64), seconds=0.02)
    assert fast.summary.error < 1e-4
    assert not isinstance(fast.self_attn.out_proj, SparseLinear)


def test_convolution_is_replaced_where_it_wins():
    model = prune(nn.Sequential(nn.Conv2d(128, 128, 3, padding=1)), 0.95)
    fast = deploy(model, torch.randn(1, 128, 32, 32), seconds=0.05)
    assert isinstance(fast[0], SparseConv2d)


class Padded(nn.Conv2d):
    """Pads by itself, as EfficientNet's "same" convolutions do."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)) if self.kernel_size[0] > 1 else x)


class Standardised(nn.Conv2d):
    """Normalises its weight on the way: folding a scale into the weight has no effect."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight / self.weight.norm(), self.bias)


def test_subclasses_are_taken_only_for_what_they_compute():
    model = nn.Sequential(
        Padded(16, 128, 2), nn.BatchNorm2d(128), Padded(128, 128, 1), Standardised(128, 128, 1), nn.BatchNorm2d(128)
    )
    fast = deploy(prune(model, 0.95), torch.randn(2, 16, 24, 24), seconds=0.05)
    reasons = [layer.reason for layer in fast.summary.layers]
    assert "computes something else" in reasons[0]
    assert isinstance(fast[2], SparseConv2d)
    assert "computes something else" in reasons[2]
    assert fast.summary.folded == (("0", "1"),)
    assert fast.summary.error < 1e-4


@pytest.mark.parametrize("inplace", [True, False])
def test_private_activations_go_into_the_kernel(inplace, tmp_path):
    def make():
        convs = [nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU(inplace=inplace)]
        return nn.Sequential(*convs, nn.Conv2d(128, 128, 1), nn.GELU(), nn.Flatten(), nn.Linear(128 * 256, 64), nn.Hardswish())

    model, x = prune(make(), 0.95), torch.randn(4, 64, 16, 16)
    fast = deploy(model, x, seconds=0.05)
    assert [layer.fused for layer in fast.summary.layers] == ["2", "4", ""]
    assert fast[3].activation == "gelu"
    assert isinstance(fast[2], nn.Identity)
    assert fast.summary.error < 1e-5
    save(fast, tmp_path / "fast.safetensors")
    assert torch.equal(load(tmp_path / "fast.safetensors", make())(x), fast(x))


def test_an_activation_that_is_not_alone_stays():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(512, 512), nn.ReLU()

        def forward(self, x):
            y = self.fc(x)
            return self.act(y) + y

    fast = deploy(prune(Both(), 0.95), torch.randn(64, 512), seconds=0.02)
    assert isinstance(fast.fc, SparseLinear)
    assert fast.fc.activation == "none"
    assert isinstance(fast.act, nn.ReLU)


def test_max_pooling_is_sliced_only_where_it_is_the_same(tmp_path):
    def make():
        return nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(3, 2), nn.MaxPool2d(2, ceil_mode=True))

    x = torch.randn(2, 64, 65, 48)
    x[0, 0, 0, 0] = float("nan")
    torch.testing.assert_close(SlicedMaxPool2d()(x), make()[0](x), equal_nan=True)
    x[0, 0, 0, 0] = 0
    fast = deploy(make(), x, seconds=0.05)
    assert [layer.name for layer in fast.summary.layers] == ["0"]
    assert torch.equal(fast(x), make()(x))
    assert isinstance(fast[0], SlicedMaxPool2d) == (fast.summary.layers[0].runtime != "dense")
    save(fast, tmp_path / "fast.safetensors")
    assert torch.equal(load(tmp_path / "fast.safetensors", make())(x), fast(x))


def test_without_the_compiled_kernels_the_reason_is_given(monkeypatch):
    model, x = prune(nn.Sequential(nn.Linear(512, 512)), 0.95), torch.randn(64, 512)
    layer = SparseLinear.from_dense(model[0].weight, model[0].bias)
    monkeypatch.setattr(native, "_extension", None)
    monkeypatch.setattr(native, "_REASON", "the compiled kernels are not installed (no such file)")
    fast = deploy(model, x, seconds=0.01)
    assert "not installed" in fast.summary.layers[0].reason
    assert fast.summary.layers[0].runtime == "dense"
    assert native.instruction_sets() == ()
    with pytest.raises(native.NoKernels, match="not installed"):
        layer(x)
