"""`sc.compress`: small, loadable, zeros kept; and the codec's tensors of every dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.coding import packed
from secateur.coding.norms import fold_norms
from secateur.coding.tensor import decode, encode
from secateur.demo import network
from secateur.errors import ArtifactError, RecipeError
from secateur.export.encode import same_bits
from secateur.export.inspect import inspect


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return network()


def same_model(one, other):
    return all(same_bits(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", packed.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0), (30, 41), (6, 3, 3, 3)], ids=str)
def test_tensors_of_every_dtype_come_back(dtype, shape):
    torch.manual_seed(0)
    whole = torch.randint(0, 2 if dtype == torch.bool else 100, shape)
    for tensor in (whole.to(dtype), (torch.randn(shape) * 50).to(dtype) if dtype.is_floating_point else whole.to(dtype)):
        assert same_bits(decode(encode(tensor)[0], dtype, shape), tensor)


@pytest.mark.parametrize("scheme", ["kmeans", "integer"])
def test_a_compressed_artifact_loads_to_the_same_bits(model, tmp_path, scheme):
    pruned = sc.prune(model, sparsity=0.8).model
    found = sc.compress(pruned, tmp_path / "small", bits=4, scheme=scheme, source="secateur.demo:network")
    assert found.path == tmp_path / "small"
    assert found.bytes == (tmp_path / "small" / "model.packed").stat().st_size
    assert found.ratio > 14
    assert same_model(sc.load(tmp_path / "small"), found.model)
    for name, weight in pruned.named_parameters():
        if weight.dim() >= 2:
            assert torch.equal(found.model.get_parameter(name) == 0, weight == 0) or scheme == "integer", name
            assert not bool(found.model.get_parameter(name)[weight == 0].any())
    seen = inspect(tmp_path / "small")
    assert seen.kind == "artifact"
    assert seen.bytes_disk == found.bytes


def test_saving_packed_changes_no_bit(model, tmp_path):
    sc.save(model, tmp_path / "plain", format="packed")
    assert same_model(sc.load(tmp_path / "plain", model=network()), model)
    assert "model.packed" in (tmp_path / "plain" / "README.md").read_text()


def test_a_damaged_packed_artifact_is_refused(model, tmp_path):
    sc.save(model, tmp_path / "plain", format="packed")
    weights = tmp_path / "plain" / "model.packed"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="SHA-256"):
        sc.load(tmp_path / "plain", model=network())


def test_the_model_given_is_untouched_and_bits_go_by_layer(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = next(name for name, p in model.named_parameters() if p.dim() >= 2)
    found = sc.compress(model, bits={first: 8, "*": 2}, ignore=["head*"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    bits = {layer.name: layer.bits for layer in found.layers if len(layer.shape) >= 2}
    assert bits[first] == 8
    assert set(bits.values()) <= {8, 2, None}
    assert sum(layer.bytes for layer in found.layers) < found.bytes < sum(layer.bytes for layer in found.layers) + 3000


def test_a_budget_is_met_and_pays(model):
    weights = [name for name, p in model.named_parameters() if p.dim() >= 2]

    def spent(found):
        return sum(layer.bytes for layer in found.layers if layer.name in weights)

    even = sc.compress(model, bits=4)
    chosen = sc.compress(model, budget=spent(even))
    assert spent(chosen) <= spent(even)
    errors = [sum(layer.error for layer in f.layers if layer.name in weights) for f in (chosen, even)]
    assert errors[0] <= errors[1] * 1.001


def test_training_shared_values_keeps_them_shared():
    torch.manual_seed(0)
    batches = [(torch.randn(64, 20), torch.randint(0, 3, (64,))) for _ in range(4)]
    pruned = sc.prune(nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 3)), sparsity=0.5).model
    loss = lambda m: sum(nn.functional.cross_entropy(m(x), y).item() for x, y in batches)  # noqa: E731
    plain = sc.compress(pruned, bits=2)
    trained = sc.compress(pruned, bits=2, train=batches, finetune={"epochs": 4, "lr": 3e-3})
    assert loss(trained.model.eval()) < loss(plain.model.eval())
    for name, weight in trained.model.named_parameters():
        if weight.dim() >= 2:
            assert len(weight.unique()) <= 4
            assert torch.equal(weight == 0, pruned.get_parameter(name) == 0)


def test_folding_norms_changes_no_output_and_leaves_constants():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    assert fold_norms(model, x) == [(model[0], model[1]), (model[3], model[4])]
    assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert model[1].weight.unique().tolist() == [1.0]
    assert not bool(model[4].running_mean.any() or model[3].bias.any())


def test_prune_compresses_where_the_recipe_says_so(model, tmp_path):
    for scheme in ("kmeans", "integer"):
        result = sc.prune(
            model, sparsity=0.7, compress={"bits": 3, "scheme": scheme}, out=tmp_path / scheme, source="secateur.demo:network"
        )
        assert result.report.after.bytes_disk == (tmp_path / scheme / "model.packed").stat().st_size
        assert result.report.after.bytes_disk < result.report.before.bytes_disk / 15
        assert not (tmp_path / scheme / "masks.safetensors").exists()
        assert same_model(sc.load(tmp_path / scheme), result.model)
        for name, mask in result.masks.items():
            assert torch.equal(mask, result.model.get_parameter(name) != 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "kmean"}, "Did you mean 'kmeans'"),
        ({"bits": 4, "budget": 10}, "give one of them"),
        ({"bits": 40}, "1 to 12 bits"),
        ({"budget": 10}, "too few"),
        ({"fold_norms": True}, "pass data="),
        ({"finetune": {"epochs": 1}}, "pass train="),
        ({"bits": {"nothing": 3}}, "says nothing of"),
    ],
)
def test_what_cannot_be_done_is_said(model, options, message):
    with pytest.raises(RecipeError, match=message):
        sc.compress(model, **options)


def test_nothing_is_compressed_for_a_target_that_cannot_be_written(model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(ArtifactError, match="will not be overwritten"):
        sc.compress(model, tmp_path / "mine", overwrite=True)


def test_a_norm_that_serves_two_layers_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.one(x)) + self.norm(self.other(x))

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(2, 3, 8, 8)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2.0)
    expected = model(x)
    assert fold_norms(model, x) == []
    assert torch.equal(model(x), expected)
