"""A checkpoint pruned a block at a time is what the model pruned in memory is, and survives kills and full disks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import secateur as sc
from secateur.errors import ArtifactError, ModelError, RecipeError
from secateur.models.torchvision_shim import prepare_torchvision

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small Llama in several shards, embedding and output not tied."""
    prepare_torchvision()
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="6KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def data():
    return [{"input_ids": torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(i))} for i in range(2)]


def weights(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5},
        {"sparsity": 0.5, "criterion": "random", "seed": 3},
        {"pattern": "2:4", "criterion": "wanda"},
        {"sparsity": 0.6, "solver": "sparsegpt"},
        {"pattern": "2:4", "solver": "alps"},
    ],
)
def test_the_same_as_in_memory(checkpoint, tmp_path, options):
    """Wanda is the exception: in memory it looks at the dense model, in a stream at the blocks pruned before."""
    report = sc.prune_checkpoint(checkpoint, out=tmp_path / "out", data=data(), **options)
    found, model = weights(tmp_path / "out"), transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    pruned = [n for n in found if "proj" in n]
    assert [layer.name for layer in report.layers] == pruned
    assert report.skipped == {"lm_head.weight": "outside the repeated blocks, which are what is streamed"}
    if options.get("criterion") != "wanda":
        more = {} if "pattern" in options else {"allocation": "uniform"}
        wanted = sc.prune(model, data=data(), ignore=["lm_head"], **options, **more).model.state_dict()
        for name, tensor in found.items():
            assert torch.equal(tensor, wanted[name]), name
    dense = model.state_dict()
    for name, tensor in found.items():
        share = float((tensor == 0).float().mean())
        assert (
            share == pytest.approx(options.get("sparsity", 0.5), abs=0.01)
            if name in pruned
            else torch.equal(tensor, dense[name])
        )
    assert report.before.nonzeros - report.after.nonzeros == sum(int((found[n] == 0).sum()) for n in pruned)
    assert sc.load_model(f"hf:{tmp_path / 'out'}").model.config.hidden_size == 16
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["layers"]


def test_what_a_stream_cannot_do_is_refused_before_any_work(checkpoint, tmp_path):
    out = tmp_path / "out"
    for options, words in [
        ({"sparsity": 0.5, "allocation": "global"}, "compares all layers"),
        ({"sparsity": 0.5, "pattern": "channel"}, "cuts units"),
        ({"sparsity": 0.5, "pattern": "neuron"}, "biases"),
        ({"sparsity": 0.5, "criterion": "taylor"}, "needs grad"),
        ({"sparsity": 0.5, "criterion": "wanda"}, "pass data="),
        ({"sparsity": 0.5, "steps": 2, "schedule": "cubic"}, "pruned once"),
    ]:
        with pytest.raises(RecipeError, match=words):
            sc.prune_checkpoint(checkpoint, out=out, **options)
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        sc.prune_checkpoint(tmp_path, out=out, sparsity=0.5)
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(ArtifactError, match="not empty"):
        sc.prune_checkpoint(checkpoint, out=out, sparsity=0.5)
    with pytest.raises(ArtifactError, match="will not be overwritten"):
        sc.prune_checkpoint(checkpoint, out=out, sparsity=0.5, overwrite=True)


def test_another_models_config_is_named(checkpoint, tmp_path):
    folder = tmp_path / "mixed"
    transformers.LlamaForCausalLM.from_pretrained(checkpoint).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    with pytest.raises(ModelError, match=r"mlp.*is \(24, 16\) in the checkpoint"):
        sc.prune_checkpoint(folder, out=tmp_path / "out", sparsity=0.5)
    (folder / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    with pytest.raises(ModelError, match="has no tensor"):
        sc.prune_checkpoint(folder, out=tmp_path / "out", sparsity=0.5)


def test_a_full_disk_keeps_what_is_done(checkpoint, tmp_path, monkeypatch):
    from secateur.stream import store

    write, calls = store.container.write, []

    def full(path, parts, metadata=None):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"a part")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, parts, metadata)

    options = {"sparsity": 0.5, "solver": "sparsegpt", "data": data()}
    sc.prune_checkpoint(checkpoint, out=tmp_path / "whole", **options)
    monkeypatch.setattr(store.container, "write", full)
    with pytest.raises(ArtifactError, match=r"No space left on device.*goes on from there"):
        sc.prune_checkpoint(checkpoint, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    sc.prune_checkpoint(checkpoint, out=tmp_path / "out", **options)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_weights_nobody_holds_are_no_weights(checkpoint):
    from secateur.models.huggingface import skeleton
    from secateur.stream.checkpoint import Checkpoint
    from secateur.stream.hollow import Hollow, without_memory

    with without_memory():
        model = skeleton(checkpoint).model
    source = Checkpoint(checkpoint)
    hollow = Hollow(model, source, source.read)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.isnan().all()
    assert weight.untyped_storage().nbytes() == 4
    with hollow.holding(model.model.layers[0]):
        assert weight.isfinite().all()
    assert weight.isnan().all()
    batch = data()[0]
    whole = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, whole(**batch).logits)
    assert weight.isnan().all()


def test_killed_at_fifteen_random_moments(tmp_path):
    script = Path(__file__).parents[1] / "solvers" / "killed_again_and_again.py"
    line = [sys.executable, str(script), str(tmp_path), "15", "2", "stream"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == 15
    assert found["resumed"] >= 3, "state was there to go on from"
    assert len(set(found["digests"])) == 1
    assert found["left"] == []
