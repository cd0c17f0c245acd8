"""`sc.export`: what was written runs elsewhere with the same outputs; what cannot be expressed is named."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import ArtifactError, ExportError, MissingExtra
from secateur.export import layouts, runners
from secateur.export.inspect import inspect
from secateur.export.targets import FORMATS

needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="onnx, onnxscript, onnxruntime are not installed"
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    )
    net[1].running_mean.normal_()
    return sc.prune(net.eval(), sparsity=0.5).model


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, 3, 8, 8)


@pytest.fixture(scope="module")
def onnx_file(model, x, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    found = sc.export(model, path, example=x)
    assert [c.batch for c in found.checks] == [1, 2, 7]
    assert max(c.error for c in found.checks) < 1e-5
    assert "opset 20" in found.notes
    return path


@needs_onnx
def test_onnx_has_dynamic_axes_one_file_and_folded_norms(onnx_file, model):
    import onnx

    graph = onnx.load(str(onnx_file)).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert [p.name for p in onnx_file.parent.iterdir()] == ["model.onnx"]
    seen = inspect(onnx_file)
    assert seen.kind == "onnx"
    assert sum(t.zeros for t in seen.tensors if len(t.shape) == 4) == int((model[0].weight == 0).sum())


@needs_onnx
def test_weights_beyond_one_file_go_beside_it_by_its_name_and_away_with_it(model, x, tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "_SINGLE_FILE", 0)
    sc.export(model, tmp_path / "one" / "model.onnx", example=x)
    with pytest.raises(ExportError, match="computes something else"):
        sc.export(model, tmp_path / "two" / "model.onnx", example=x, tolerance=-1.0)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["model.onnx", "model.onnx.data", "one", "two"]
    (tmp_path / "one" / "model.onnx").rename(tmp_path / "moved.onnx")
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data exists; pass overwrite=True"):
        sc.export(model, tmp_path / "one" / "model.onnx", example=x)
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["model.onnx.data"]


@needs_onnx
def test_int8_keeps_zeros_and_weights_by_channel(model, x, tmp_path):
    import onnx

    batches = [torch.randn(16, 3, 8, 8) for _ in range(3)]
    found = sc.export(model, tmp_path / "int8.onnx", example=x, int8=batches)
    assert 0 < max(c.error for c in found.checks) < 0.1
    graph = onnx.load(str(tmp_path / "int8.onnx")).graph
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph.node}
    weights = [
        onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4
    ]
    assert len(weights) == 1
    assert ((weights[0] == 0) | (model[0].weight.detach().numpy() != 0)).all()


@needs_onnx
def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x @ x.transpose(1, 2)).real

    with pytest.raises(ExportError, match=r"cannot express the operator aten.linalg_eig"):
        sc.export(Odd(), tmp_path / "odd.onnx", example=torch.randn(2, 3, 3))
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_outputs_that_differ_are_refused_and_nothing_is_left(x, tmp_path):
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    with pytest.raises(ExportError, match=r"computes something else|cannot follow"):
        sc.export(Moody(), tmp_path / "moody.onnx", example=x)
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_tensorrt_says_which_layers_are_two_four_and_the_exact_line(tmp_path):
    torch.manual_seed(0)
    net = sc.prune(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8)), pattern="2:4").model
    net[2].weight.data[0, :4] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    found = sc.export(net, tmp_path / "trt", to="tensorrt", example=torch.randn(2, 16))
    assert found.command == (
        "trtexec --onnx=model.onnx --saveEngine=model.engine --minShapes=input:1x16 --optShapes=input:8x16 "
        "--maxShapes=input:32x16 --sparsity=enable"
    )
    assert any("2.weight has zeros but is not 2:4" in note for note in found.notes)
    assert (tmp_path / "trt" / "trtexec.sh").read_text().endswith(found.command + "\n")


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino(model, x, tmp_path):
    found = sc.export(model, tmp_path / "ir", to="openvino", example=x)
    assert max(c.error for c in found.checks) < 1e-5
    seen = inspect(tmp_path / "ir")
    assert seen.kind == "openvino"
    assert any(t.shape == (8, 3, 3, 3) and t.zeros for t in seen.tensors)


def test_torch_export(model, x, tmp_path):
    found = sc.export(model, tmp_path / "model.pt2", example=x)
    assert [c.batch for c in found.checks] == [1, 2, 7]
    assert max(c.error for c in found.checks) < 1e-6
    with pytest.raises(ArtifactError, match="exists; pass overwrite=True"):
        sc.export(model, tmp_path / "model.pt2", example=x)


def test_csr_is_what_scipy_reads(model, tmp_path):
    sparse = pytest.importorskip("scipy.sparse")
    sc.export(model, tmp_path / "csr", to="csr")
    weight = sparse.load_npz(tmp_path / "csr" / "5.weight.npz")
    assert (weight.toarray() == model[5].weight.detach().numpy()).all()
    assert {t.name: t.zeros for t in inspect(tmp_path / "csr").tensors}["5.weight"] == int((model[5].weight == 0).sum())
    sparse.save_npz(tmp_path / "theirs.npz", weight)
    assert torch.equal(layouts.read_csr(tmp_path / "theirs.npz"), model[5].weight)


@pytest.mark.parametrize(("pattern", "layout"), [("2:4", "sparse-24-bitmask"), ("element", "sparse-bitmask")])
def test_compressed_tensors_both_ways(pattern, layout, tmp_path):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))
    net = sc.prune(dense, pattern=pattern, **({} if ":" in pattern else {"sparsity": 0.6})).model
    if ":" in pattern:
        net[0].weight.data[0, 0:4] = 0  # fewer than two of four left: zeros are stored among the values
    found = sc.export(net, tmp_path / "ct", to="compressed-tensors")
    assert found.notes[0] == layout
    back = dict(layouts.read_compressed_tensors(tmp_path / "ct"))
    assert back.keys() == net.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in net.state_dict().items())
    assert inspect(tmp_path / "ct").kind == "compressed-tensors"
    assert inspect(tmp_path / "ct").zeros == sum(int((p == 0).sum()) for p in net.parameters())


def test_compressed_tensors_hold_what_the_state_dict_holds(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data[:, ::2] = 0
    model[0].register_buffer("scale", torch.ones(8), persistent=False)
    sc.export(model, tmp_path / "ct", to="compressed-tensors")
    assert dict(layouts.read_compressed_tensors(tmp_path / "ct")).keys() == model.state_dict().keys()


def test_the_bitmask_layout_by_hand(tmp_path):
    net = nn.Sequential(nn.Linear(9, 2, bias=False))
    net[0].weight.data = torch.tensor([[0, 1.0, 0, 0, 0, 0, 0, 2.0, 3.0], [4.0, 0, 0, 0, 0, 0, 0, 0, 0]])
    sc.export(net, tmp_path / "ct", to="compressed-tensors")
    from safetensors.torch import load_file

    found = load_file(tmp_path / "ct" / "model.safetensors")
    assert found["0.weight.bitmask"].tolist() == [[0b10000010, 1], [1, 0]]
    assert found["0.weight.compressed"].tolist() == [1, 2, 3, 4]
    assert found["0.weight.row_offsets"].tolist() == [0, 3]
    assert found["0.weight.shape"].tolist() == [2, 9]


def test_safetensors_are_dense(model, tmp_path):
    from safetensors.torch import load_file

    sc.export(model, tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_a_missing_extra_prints_its_install_line(model, x, tmp_path, monkeypatch):
    def gone(name):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", gone)
    with pytest.raises(MissingExtra, match=r"pip install 'secateur\[onnx\]'"):
        runners.need("onnx", "onnx", "export to ONNX")


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("x.onxx", {}, "pass to="),
        ("x", {"to": "onx"}, "Did you mean 'onnx'"),
        ("x.onnx", {}, "pass example="),
        ("x.pt2", {"example": torch.tensor(1.0)}, "batch dimension"),
        ("x", {"to": "csr", "int8": [1]}, "is for onnx and tensorrt"),
        ("x", {"to": "hf"}, "no Hugging Face model"),
        ("x", {"to": "compressed-tensors"}, "no linear weight has a zero"),
    ],
)
def test_what_cannot_be_done_is_said(path, options, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        sc.export(nn.Linear(4, 4), tmp_path / path, **options)
    assert len(FORMATS) == 9
