from __future__ import annotations

import itertools
import json
import pickle

import pytest
import torch
from assets import asset
from safetensors.torch import save_file
from torch import nn

from secateur.errors import ArtifactError
from secateur.export.artifact import save
from secateur.export.inspect import inspect
from secateur.export.masks import load_masks, save_masks
from secateur.export.structure import BLOCKS, N_OF_M, in_blocks, keeps_n_of_m, look
from secateur.progress import listening
from secateur.types import MaskSet


def n_of_m(shape, n, m) -> torch.Tensor:
    """A random weight of which exactly the `n` largest of every `m` inputs stay."""
    weight = torch.randn(shape)
    moved = weight.movedim(1, -1)
    groups = moved.reshape(-1, m)
    mask = torch.zeros_like(groups).scatter(1, groups.abs().topk(n).indices, 1.0)
    return (groups * mask).reshape(moved.shape).movedim(-1, 1).masked_fill(mask.reshape(moved.shape).movedim(-1, 1) == 0, 0)


@pytest.mark.parametrize("shape", [(8, 16), (6, 32, 3, 3), (4, 16, 5)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (2, 8)])
def test_n_of_m_is_recognised_along_the_inputs(shape, n, m):
    weight = n_of_m(shape, n, m)
    found = [p for p in look("w", weight).patterns if ":" in p]
    assert f"{n}:{m}" in found
    assert found == [f"{a}:{b}" for a, b in N_OF_M if brute_n_of_m(weight, a, b)]


def brute_n_of_m(weight, n, m) -> bool:
    rows = weight.movedim(1, -1).reshape(-1, weight.shape[1])
    if weight.shape[1] % m:
        return False
    return all(int((row[i : i + m] != 0).sum()) <= n for row in rows for i in range(0, len(row), m))


def test_patterns_against_brute_force():
    generator = torch.Generator().manual_seed(1)
    seen = set()
    for rows, cols, kernel in itertools.product((4, 6, 8), (4, 8, 12, 10), (1, 2)):
        for density in (0.1, 0.3, 0.6):
            kept = torch.rand(rows, cols, kernel, generator=generator) < density
            for n, m in N_OF_M:
                want = brute_n_of_m(kept.float(), n, m)
                seen.add(want)
                assert keeps_n_of_m(kept, n, m) == want
            coarse = kept.repeat_interleave(4, 0)
            for weight, (r, c) in itertools.product((kept, coarse), BLOCKS):
                flat = weight.flatten(1)
                fits = flat.shape[0] % r == 0 and flat.shape[1] % c == 0
                want = fits and all(
                    len({bool(v) for v in flat[i : i + r, j : j + c].flatten()}) == 1
                    for i in range(0, flat.shape[0], r)
                    for j in range(0, flat.shape[1], c)
                )
                seen.add((r, want))
                assert in_blocks(weight, r, c) == want
    assert {True, False, (4, True), (4, False), (1, False)} <= seen


def test_one_violation_is_enough():
    weight = n_of_m((8, 16), 2, 4)
    weight[5, 4:8] = 1.0
    info = look("w", weight)
    assert "2:4" not in info.patterns


def test_dense_empty_and_collapsed_tensors_claim_no_pattern():
    assert look("w", torch.randn(8, 8)).patterns == ()
    assert look("w", torch.zeros(8, 8)).patterns == ()
    assert look("w", torch.zeros(8, 8)).collapsed == "zero"
    assert look("w", torch.full((8, 8), 2.5)).collapsed == "constant"
    assert look("w", torch.tensor(1.0)).collapsed is None
    assert look("w", torch.zeros(0, 8)).collapsed is None
    assert look("w", torch.tensor([1.0, 1.0, 1.5])).collapsed is None


def test_rows_columns_and_broken_values():
    weight = torch.randn(10, 6, 2)
    weight[3] = 0
    weight[7] = 0
    weight[:, 4] = 0
    weight[5] = weight[2]
    weight[9] = weight[2]
    weight[0, 0, 0], weight[0, 1, 0], weight[1, 1, 1] = float("nan"), float("inf"), -float("inf")
    weight[4, 0, 0] = -0.0
    info = look("w", weight)
    assert (info.zero_rows, info.zero_columns, info.duplicate_rows) == (2, 1, 2)
    assert (info.nan, info.inf, info.negative_zeros) == (1, 2, 1)
    assert info.zeros == int((weight == 0).sum())
    assert info.elements == 120
    assert info.collapsed is None


def test_duplicate_rows_are_not_found_where_there_are_none():
    assert look("w", torch.arange(30_000.0).reshape(-1, 3)).duplicate_rows == 0
    assert look("w", torch.tensor([[1.0, 2.0], [2.0, 1.0], [3.0, 0.0], [0.0, 3.0]])).duplicate_rows == 0
    few = torch.randint(0, 2, (64, 3))
    alive = few[few.any(1)]
    assert look("w", few.half()).duplicate_rows == len(alive) - len(alive.unique(dim=0))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.int8,
        torch.uint16,
        torch.bool,
        torch.complex64,
        torch.complex32,
        torch.complex128,
    ],
)
def test_every_dtype_can_be_looked_at(dtype):
    tensor = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]]).to(dtype)
    info = look("w", tensor)
    assert (info.zeros, info.duplicate_rows, info.zero_columns) == (4, 1, 2)
    assert info.bytes_dense == 8 * dtype.itemsize


def test_bytes_are_what_save_writes(tmp_path):
    model = nn.Linear(100, 100, bias=False)
    with torch.no_grad():
        model.weight.masked_fill_(torch.rand(100, 100) < 0.8, 0)
    for format, field in (("dense", "bytes_dense"), ("bitmask", "bytes_bitmask"), ("csr", "bytes_csr")):
        folder = save(model, tmp_path / format, format=format)
        found = inspect(folder)
        (info,) = found.tensors
        assert 0 < found.bytes_disk - getattr(info, field) < 400
        assert found.bytes_best == min(info.bytes_dense, info.bytes_bitmask)
        assert found.kind == "artifact"


def tensors() -> dict[str, torch.Tensor]:
    return {"a": n_of_m((8, 16), 2, 4), "b": torch.zeros(4, 4), "c": torch.randn(5)}


def check(found, kind) -> None:
    want = tensors_cache
    assert found.kind == kind
    assert {t.name for t in found.tensors} == set(want)
    by_name = {t.name: t for t in found.tensors}
    assert "2:4" in by_name["a"].patterns
    assert found.collapsed == ("b",)
    assert found.zeros == sum(int((t == 0).sum()) for t in want.values())
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["totals"]["elements"] == sum(t.numel() for t in want.values())


tensors_cache: dict[str, torch.Tensor] = {}


@pytest.fixture
def state():
    tensors_cache.clear()
    tensors_cache.update(tensors())
    return tensors_cache


def test_safetensors_file_and_hugging_face_directory(tmp_path, state):
    save_file(state, tmp_path / "model.safetensors")
    check(inspect(tmp_path / "model.safetensors"), "safetensors")
    check(inspect(tmp_path), "safetensors")


def shards(folder, state) -> None:
    save_file({"a": state["a"]}, folder / "model-1.safetensors")
    save_file({"b": state["b"], "c": state["c"]}, folder / "model-2.safetensors")
    table = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def test_sharded_directory_with_an_index(tmp_path, state):
    shards(tmp_path, state)
    check(inspect(tmp_path), "sharded safetensors")


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"a": "../x.safetensors"}, "plain file name"),
        ({"a": "/etc/passwd"}, "plain file name"),
        ({"a": "gone.safetensors"}, "cannot be read"),
        ({"zzz": "model-1.safetensors"}, "lacks the tensor 'zzz'"),
        ({"a": 3}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_indexes_that_lie(tmp_path, state, table, match):
    shards(tmp_path, state)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(ArtifactError, match=match):
        inspect(tmp_path)


@pytest.mark.parametrize("old", [False, True])
def test_torch_state_dicts(tmp_path, state, old):
    path = tmp_path / "x.pth"
    torch.save(dict(state), path, _use_new_zipfile_serialization=not old)
    check(inspect(path), "torch")


def test_nested_checkpoints_and_ties(tmp_path):
    weight = torch.randn(4, 4)
    torch.save({"epoch": 3, "state_dict": {"w": weight, "tied": weight}, "more": [torch.ones(2)]}, tmp_path / "x.pt")
    found = inspect(tmp_path / "x.pt")
    assert [t.name for t in found.tensors] == ["state_dict.w", "more.0"]
    assert found.aliases == {"state_dict.tied": "state_dict.w"}


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"w": Evil()}, tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(nn.Linear(2, 2), tmp_path / "z.pt")
    for name in ("x.pt", "y.pt", "z.pt"):
        with pytest.raises(ArtifactError, match="without running code"):
            inspect(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.txt", "missing.pt", "folder"])
def test_what_is_no_checkpoint(tmp_path, name):
    (tmp_path / "folder").mkdir()
    if name.startswith("x"):
        (tmp_path / name).write_bytes(b"hello, world")
    with pytest.raises(ArtifactError):
        inspect(tmp_path / name)


def test_progress_is_reported(tmp_path, state):
    save_file(state, tmp_path / "m.safetensors")
    heard = []
    with listening(lambda what, done, total, note: heard.append((what, done, total))):
        inspect(tmp_path / "m.safetensors")
    assert heard[0] == ("inspecting", 0, 3)
    assert heard[-1] == ("inspecting", 3, 3)


def test_a_real_checkpoint():
    found = inspect(next(iter(sorted(asset("cifar10_resnet").glob("*.safetensors")))))
    assert not found.broken
    assert not found.collapsed
    assert found.sparsity < 0.2
    assert found.elements > 250_000


def test_masks_survive_the_disk(tmp_path):
    masks = MaskSet({"a": torch.rand(7, 3) > 0.5, "b": torch.tensor(True), "c": torch.zeros(0, 3, dtype=torch.bool)})
    path = save_masks(masks, tmp_path / "m.safetensors")
    back = load_masks(path)
    assert set(back) == set(masks)
    assert all(torch.equal(back[n], masks[n]) for n in masks)
    save_masks({"a": masks["a"]}, path)
    assert set(load_masks(path)) == {"a"}
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    large = MaskSet({"w": torch.rand(1000, 1000) > 0.9})
    assert save_masks(large, tmp_path / "large").stat().st_size < 125_400
    assert len(load_masks(save_masks({}, tmp_path / "none"))) == 0
    with pytest.raises(ArtifactError, match="bool"):
        save_masks({"a": torch.ones(3)}, tmp_path / "bad")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_masks(tmp_path / "missing")
    with pytest.raises(ArtifactError, match="cannot be written"):
        save_masks({"a": torch.ones(3) > 0}, tmp_path / "no" / "such" / "folder")
