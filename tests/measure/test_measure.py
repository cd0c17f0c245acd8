from __future__ import annotations

import pytest
import torch
from resnet20 import images, trained
from torch import nn

from secateur.errors import ModelError
from secateur.measure.measure import measure
from secateur.models.torchvision_shim import prepare_torchvision


def test_without_an_example_only_sizes():
    got = measure(nn.Linear(30, 20))
    assert (got.parameters, got.nonzeros, got.bytes_memory) == (620, 620, 2480)
    assert got.bytes_disk > 2480
    assert got.macs is got.macs_nonzero is got.latency is None
    assert got.quality == {}


def test_bytes_on_disk_are_those_that_save_writes(tmp_path):
    from secateur.export.artifact import save

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight[:50] = 0
    size = measure(model).bytes_disk
    save(model, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_size == size < 4 * 64 * 64


def test_a_real_network_with_everything():
    model = trained()
    x, labels = images("test", range(0, 10000, 100))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.view(-1)[::2] = 0
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def accuracy(m):
        return {"top1": (m(x).argmax(1) == labels).float().mean()}

    got = measure(model, (x[:2], labels[:2]), evaluate=accuracy, runs=3, warmup=1, threads=1)
    assert got.parameters == 269_722
    convolutions = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    assert got.nonzeros == pytest.approx(got.parameters - convolutions / 2, abs=32)
    assert got.macs == 2 * 40_551_040
    assert got.macs_nonzero == 2 * (40_550_400 // 2 + 640)
    assert got.latency.batch == 2
    assert got.latency.runs == 3
    assert 0 <= got.quality["top1"] <= 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_small_transformer_with_a_mapping():
    transformers = pytest.importorskip("transformers")
    prepare_torchvision()
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config)
    batch = {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    got = measure(model, batch, latency=False)
    positions, layer = 2 * 7, 4 * 16 * 16 + 2 * 16 * 32
    assert got.macs == 2 * (positions * layer + 2 * 2 * 7 * 7 * (8 + 8)) + 2 * (16 * 16 + 16 * 3)
    assert got.latency is None
    assert model.training


def test_unknown_kernels_are_said(caplog):
    @torch.library.custom_op("secateur_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    class Foreign(nn.Module):
        def forward(self, x):
            return double(x)

    assert measure(Foreign(), torch.zeros(1, 2), latency=False).macs == 0
    assert "secateur_test.double" in caplog.text


def test_tensors_that_cannot_be_saved_have_no_size_on_disk(caplog):
    model = nn.Module()
    model.register_buffer("weight", torch.eye(3).to_sparse_coo())
    assert measure(model).bytes_disk is None
    assert "bytes on disk are not known" in caplog.text


def test_a_wrong_example():
    with pytest.raises(ModelError, match="does not run on the example"):
        measure(nn.Linear(3, 2), torch.zeros(1, 4))
