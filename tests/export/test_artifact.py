from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from secateur.errors import ArtifactError
from secateur.export.artifact import load, save, weights_bytes
from secateur.export.encode import same_bits
from secateur.export.masks import load_masks
from secateur.export.reader import Artifact
from secateur.export.state import state_of
from secateur.types import Cut, LayerPlan, MaskSet, Measurement, Plan, Report


def sparse(*shape: int, density: float = 0.2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.randn(*shape).to(dtype)
    return weight.masked_fill_(torch.rand(*shape) > density, 0)


class Everything(nn.Module):
    """Every kind of tensor that a module can hold."""

    def __init__(self, fill: bool = False):
        super().__init__()
        make = sparse if fill else lambda *shape, dtype=torch.float32, density=1.0: torch.zeros(*shape, dtype=dtype)
        self.linear = nn.Linear(40, 30)
        self.linear.weight = nn.Parameter(make(30, 40))
        self.conv = nn.Conv2d(6, 8, 3)
        self.fp16 = nn.Parameter(make(33, 17, dtype=torch.float16))
        self.bf16 = nn.Parameter(make(33, 17, dtype=torch.bfloat16))
        self.fp64 = nn.Parameter(make(9, 7, dtype=torch.float64))
        self.scalar = nn.Parameter(torch.tensor(3.5 if fill else 0.0))
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.strided = nn.Parameter(make(20, 64)[:, ::2])
        self.transposed = nn.Parameter(make(16, 12).t())
        self.last = nn.Parameter(make(4, 8, 5, 5).to(memory_format=torch.channels_last))
        self.complex = nn.Parameter(torch.complex(make(8, 8), make(8, 8)))
        self.register_buffer("complex128", torch.complex(make(3, 8), make(3, 8)).to(torch.complex128))
        self.register_buffer("conj", torch.complex(make(3, 3), make(3, 3)).conj())
        self.register_buffer("int64", torch.arange(10) - 5 if fill else torch.zeros(10, dtype=torch.int64))
        self.register_buffer("uint16", torch.arange(10).to(torch.uint16) if fill else torch.zeros(10, dtype=torch.uint16))
        self.register_buffer("flags", torch.rand(100) > 0.9 if fill else torch.zeros(100, dtype=torch.bool))
        self.register_buffer("fp8", make(16, 16).to(torch.float8_e4m3fn))
        self.register_buffer("hidden", make(5, 5), persistent=False)
        self.register_buffer("none", None)
        odd = torch.tensor([float("nan"), float("inf"), -0.0, 0.0, 1e-45, -float("nan")] + [0.0] * 60)
        self.register_buffer("odd", odd if fill else torch.zeros(66))
        self.rnn = nn.LSTM(4, 3)
        self.norm = nn.BatchNorm1d(4)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    a, b = state_of(one), state_of(other)
    assert dict(a.aliases) == dict(b.aliases)
    assert a.tensors.keys() == b.tensors.keys()
    for name, (kind, tensor) in a.tensors.items():
        assert b.tensors[name][0] == kind
        assert same_bits(tensor, b.tensors[name][1]), name


@pytest.mark.parametrize("format", ["auto", "dense", "bitmask", "csr"])
def test_everything_comes_back_bit_by_bit(tmp_path, format):
    model = Everything(fill=True)
    path = save(model, tmp_path / "a", format=format)
    fresh = Everything()
    assert load(path, model=fresh) is fresh
    assert_same(model, fresh)
    assert (path / "model.safetensors").stat().st_size == weights_bytes(model, format=format)
    kinds = {entry.encoding for entry in Artifact(path).manifest.tensors.values()}
    assert kinds == {"dense", {"auto": "bitmask"}.get(format, format)}


def test_files_are_readable_by_the_safetensors_library(tmp_path):
    model = Everything(fill=True)
    files = load_file(save(model, tmp_path / "a", format="dense") / "model.safetensors")
    assert same_bits(files["fp16"], model.fp16)
    assert same_bits(files["strided"], model.strided)
    assert files["complex128"].shape == (3, 8, 2)
    files = load_file(save(model, tmp_path / "b") / "model.safetensors")
    assert torch.equal(files["linear.weight::values"], model.linear.weight[model.linear.weight != 0])


def test_sparse_tensors_are_small_and_dense_ones_not_larger(tmp_path):
    model = nn.Linear(1000, 1000, bias=False)
    dense = weights_bytes(model)
    assert dense - 4_000_000 < 200
    with torch.no_grad():
        model.weight.masked_fill_(torch.rand(1000, 1000) < 0.9, 0)
    kept = int(model.weight.count_nonzero())
    assert 0 <= weights_bytes(model) - (kept * 4 + 125_000) < 300
    assert 0 <= weights_bytes(model, format="csr") - (kept * 8 + 4 * 1001) < 300
    assert weights_bytes(model, format="dense") == dense


def test_same_model_makes_the_same_bytes(tmp_path):
    model = Everything(fill=True)
    one, other = save(model, tmp_path / "a"), save(model, tmp_path / "b")
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()


class Tied(nn.Module):
    def __init__(self, tie: bool = True):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.block = nn.Linear(8, 8)
        self.again = self.block if tie else nn.Linear(8, 8)
        if tie:
            self.head.weight = self.embed.weight


def test_tied_parameters_are_stored_once_and_come_back_tied(tmp_path):
    model = Tied()
    path = save(model, tmp_path / "a")
    manifest = Artifact(path).manifest
    assert manifest.aliases == {"head.weight": "embed.weight", "again.weight": "block.weight", "again.bias": "block.bias"}
    assert_same(load(path, model=Tied()), model)
    untied = load(path, model=Tied(tie=False))
    assert untied.head.weight is untied.embed.weight
    assert untied.again.weight is untied.block.weight


def test_parameters_that_share_memory_without_being_one_object_are_tied(tmp_path):
    model = Tied(tie=False)
    model.head.weight.data = model.embed.weight.data
    path = save(model, tmp_path / "a")
    assert Artifact(path).manifest.aliases == {"head.weight": "embed.weight"}


def test_untied_values_do_not_go_into_a_tied_model(tmp_path):
    model = Tied(tie=False)
    path = save(model, tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"ties 'head.weight' to 'embed.weight'"):
        load(path, model=Tied())
    with torch.no_grad():
        model.head.weight.copy_(model.embed.weight)
        model.again.load_state_dict(model.block.state_dict())
    loaded = load(save(model, tmp_path / "b"), model=Tied())
    assert loaded.head.weight is loaded.embed.weight
    assert same_bits(loaded.head.weight, model.head.weight)


def test_meta_models_are_filled_and_stay_tied(tmp_path):
    model = Tied()
    path = save(model, tmp_path / "a")
    with torch.device("meta"):
        fresh = Tied()
    load(path, model=fresh)
    assert_same(model, fresh)
    assert fresh.head.weight is fresh.embed.weight
    rnn = nn.LSTM(3, 2)
    with torch.device("meta"):
        empty = nn.LSTM(3, 2)
    load(save(rnn, tmp_path / "b"), model=empty)
    x = torch.randn(4, 1, 3)
    assert torch.equal(rnn(x)[0], empty(x)[0])


def test_the_saved_dtype_wins_and_requires_grad_stays(tmp_path):
    model = nn.Linear(5, 4).to(torch.bfloat16)
    fresh = nn.Linear(5, 4).requires_grad_(False)
    parameter = fresh.weight
    load(save(model, tmp_path / "a"), model=fresh)
    assert fresh.weight is parameter
    assert not fresh.weight.requires_grad
    assert same_bits(fresh.weight, model.weight)
    with pytest.raises(ArtifactError, match="saved as bfloat16"):
        load(tmp_path / "a", model=nn.Linear(5, 4).to(torch.complex64))


def test_overlapping_memory_is_stored_and_filled(tmp_path):
    model, fresh = nn.Module(), nn.Module()
    model.w = nn.Parameter(torch.randn(1, 4).expand(3, 4))
    fresh.w = nn.Parameter(torch.randn(1, 4).expand(3, 4))
    load(save(model, tmp_path / "a"), model=fresh)
    assert same_bits(model.w, fresh.w)


def test_names_and_shapes_that_do_not_fit_are_named(tmp_path):
    path = save(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"the model lacks: 1.weight, 1.bias"):
        load(path, model=nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(ArtifactError, match=r"the artifact lacks: 2.weight"):
        load(path, model=nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2, bias=False)))
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    before = model[0].weight.clone()
    with pytest.raises(ArtifactError, match=r"'1.weight' \[2, 3\] \(the model's is \[5, 3\]\)"):
        load(path, model=model)
    assert torch.equal(before, model[0].weight)


def test_non_persistent_buffers_may_differ(tmp_path):
    class Cache(nn.Module):
        def __init__(self, size):
            super().__init__()
            if size:
                self.register_buffer("mask", torch.randn(size, size), persistent=False)
            self.w = nn.Parameter(torch.ones(2))

    model = Cache(3)
    path = save(model, tmp_path / "a")
    assert same_bits(load(path, model=Cache(5)).mask, model.mask)
    assert not hasattr(load(path, model=Cache(0)), "mask")
    assert load(save(Cache(0), tmp_path / "b"), model=Cache(2)).mask.shape == (2, 2)


def test_wrapped_models_have_the_names_of_what_they_wrap(tmp_path):
    model = nn.Linear(3, 2)
    save(torch.compile(model), tmp_path / "a")
    assert set(Artifact(tmp_path / "a").manifest.tensors) == {"weight", "bias"}
    fresh = nn.DataParallel(nn.Linear(3, 2))
    load(tmp_path / "a", model=fresh)
    assert same_bits(fresh.module.weight, model.weight)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: setattr(m, "lazy", nn.LazyLinear(3)), "run the model once"),
        (lambda m: setattr(m, "meta", nn.Linear(3, 3, device="meta")), "meta device"),
        (lambda m: m.register_buffer("coo", torch.eye(3).to_sparse()), "not a plain dense tensor"),
        (lambda m: m.register_buffer("q", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)), "quint8|qint8"),
        (lambda m: setattr(m, "extra", Extra()), "would be lost"),
        (lambda m: m.register_buffer("weight::bits", torch.ones(3)), "rename one"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, spoil, message):
    model = nn.Linear(64, 64)
    nn.init.zeros_(model.weight)
    spoil(model)
    with pytest.raises(ArtifactError, match=message):
        save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


class Extra(nn.Module):
    def get_extra_state(self):
        return {"step": 3}

    def set_extra_state(self, state):
        pass


def test_recipe_report_plan_and_extra_files(tmp_path):
    plan = Plan((LayerPlan("w", (2, 2), 4, 2, "element"),), (Cut("w", 0, (0, 2)),), {"b": "bias"})
    report = Report("demo", Measurement(4, 4, 16), Measurement(4, 2, 16), notes=("one",))
    path = save(
        nn.Linear(2, 2),
        tmp_path / "new" / "a",
        recipe="version = 1\n",
        plan=plan,
        report=report,
        extra_files={"report.html": "<html>", "x.bin": b"\x00"},
    )
    with Artifact(path) as artifact:
        assert artifact.plan == plan
        assert artifact.report == report
        assert artifact.recipe == "version = 1\n"
        assert artifact.read("x.bin") == b"\x00"
        artifact.verify()
    assert sorted(p.name for p in path.iterdir()) == sorted(
        ["model.safetensors", "secateur.json", "recipe.toml", "report.json", "README.md", "report.html", "x.bin"]
    )
    assert 'sc.load("this directory"' in (path / "README.md").read_text()
    listed = json.loads((path / "secateur.json").read_text())["files"]
    assert set(listed) == {p.name for p in path.iterdir()} - {"secateur.json"}


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", ".hidden", "", "secateur.json", "model.safetensors", "a\x00b"])
def test_extra_files_stay_in_the_directory(tmp_path, name):
    with pytest.raises(ArtifactError):
        save(nn.Linear(2, 2), tmp_path / "a", extra_files={name: "x"})
    assert list(tmp_path.iterdir()) == []


def test_masks_are_kept_beside_the_weights(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    masks = MaskSet({"0.weight": torch.rand(64, 64) > 0.8, "1.weight": torch.rand(64, 64) > 0.8})
    with pytest.raises(ArtifactError, match="apply the masks first"):
        save(model, tmp_path / "a", masks=masks)
    masks.apply(model)
    path = save(model, tmp_path / "a", masks=masks)
    assert not (path / "masks.safetensors").exists()
    back = load_masks(path)
    assert set(back) == set(masks)
    assert not back.diff(masks)
    with torch.no_grad():
        model[1].weight[masks["1.weight"].nonzero()[0].tolist()] = 0  # kept, and zero by chance
    path = save(model, tmp_path / "b", masks=masks)
    assert Artifact(path).manifest.masks == {"0.weight": "nonzero", "1.weight": "stored"}
    assert not load_masks(path).diff(masks)
    with pytest.raises(ArtifactError, match="no such parameter"):
        save(model, tmp_path / "c", masks={"2.weight": masks["0.weight"]})
    with pytest.raises(ArtifactError, match=r"must be bool \[64, 64\]"):
        save(model, tmp_path / "c", masks={"0.weight": masks["0.weight"][:3]})


def test_negative_zeros_survive_and_are_spoken_of(tmp_path, caplog):
    model = nn.Linear(64, 64)
    model.weight.data *= torch.rand(64, 64) > 0.9
    assert ((model.weight == 0) & model.weight.signbit()).any()
    with caplog.at_level(logging.WARNING, "secateur"):
        path = save(model, tmp_path / "a")
    assert "negative zeros" in caplog.text
    assert same_bits(load(path, model=nn.Linear(64, 64)).weight, model.weight)


def build() -> nn.Module:
    return nn.Linear(6, 5)


def test_rebuilt_from_the_recorded_source(tmp_path):
    source = tmp_path / "made.py"
    source.write_text("from torch import nn\n\ndef build():\n    return nn.Linear(6, 5)\n")
    model = build()
    path = save(model, tmp_path / "a", source=f"{source}:build")
    assert_same(load(path), model)
    chained = save(model, tmp_path / "b", source=str(path))
    assert Artifact(chained).manifest.source == f"{source}:build"


def test_without_a_source_it_says_what_to_do(tmp_path):
    path = save(build(), tmp_path / "a")
    with pytest.raises(ArtifactError, match="records no source") as error:
        load(path)
    assert "model=fresh" in str(error.value)


def test_sources_inside_the_artifact_or_that_are_itself_are_refused(tmp_path):
    code = "raise SystemExit('ran')"
    path = save(build(), tmp_path / "a", source=f"{tmp_path / 'a' / 'evil.py'}:build", extra_files={"evil.py": code})
    with pytest.raises(ArtifactError, match="code inside itself"):
        load(path)
    path = save(build(), tmp_path / "b", source=str(tmp_path / "b"))
    with pytest.raises(ArtifactError, match="names itself"):
        load(path)


def test_a_cut_model_fills_a_whole_one_by_its_plan(tmp_path):
    plan = Plan(cuts=(Cut("weight", 0, (0, 1, 2)), Cut("bias", 0, (0, 1, 2))))
    small = nn.Linear(6, 3)
    path = save(small, tmp_path / "a", plan=plan)
    for model in (nn.Linear(6, 3), nn.Linear(6, 5)):
        assert load(path, model=model) is model
        assert torch.equal(model.weight, small.weight)
        assert model.out_features == 3
    with pytest.raises(ArtifactError, match=r"shapes are not the model's|do not fit"):
        load(path, model=nn.Linear(7, 5))
    with pytest.raises(ArtifactError, match=r"do not fit"):
        load(path, model=nn.Linear(6, 2))


def test_formats_are_checked(tmp_path):
    with pytest.raises(ArtifactError, match="Did you mean 'bitmask'"):
        save(build(), tmp_path / "a", format="bitmaks")


def test_missing_directories_and_plain_files(tmp_path):
    for path in (tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(ArtifactError, match=r"does not exist|is not a directory"):
            load(path, model=build())
