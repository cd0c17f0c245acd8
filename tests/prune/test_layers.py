"""Whole blocks taken out by `sc.prune`, and units that have to go."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import LayerError, RecipeError, UnknownName
from secateur.graph.blocks import bypassed_output

SCALES = (1.0, 1e-3, 2.0, 0.1)


class Block(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.norm, self.up, self.down, self.scale = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), scale

    def forward(self, x):
        return x + self.scale * self.down(F.relu(self.up(self.norm(x))))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([Block(s) for s in SCALES])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build():
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def problem():
    model, x = build(), torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    return model, [(x[:12], torch.arange(12) % 3), (x[12:], torch.arange(8) % 3)]


def loss_without(model, names, data):
    logits = [bypassed_output(model, names, x)[0] for x, _ in data]
    return float(F.cross_entropy(torch.cat(logits), torch.cat([y for _, y in data])))


def test_the_blocks_that_change_least_go(problem):
    model, data = problem
    result = sc.prune(model, pattern="layer", sparsity=0.5, criterion="block_cosine", data=data)
    assert result.plan.dropped == ("blocks.1", "blocks.3")
    assert len(result.model.blocks) == 2
    assert len(model.blocks) == 4
    with torch.no_grad():
        assert torch.equal(result.model(data[0][0]), bypassed_output(model, result.plan.dropped, data[0][0])[0])
    assert not any(m._forward_hooks for m in [*model.modules(), *result.model.modules()])
    gone = {p.name for p in result.plan.layers if not p.kept}
    assert gone == {f"blocks.{i}.{n}.weight" for i in (1, 3) for n in ("up", "down")}
    assert not any("pass nothing on" in note for note in result.report.notes)
    assert "blocks.1, blocks.3" in " ".join(result.report.notes)


def test_drop_and_measure_is_brute_force(problem):
    model, data = problem
    names = [f"blocks.{i}" for i in range(4)]
    alone = {n: loss_without(model, [n], data) for n in names}
    once = sc.plan(model, pattern="layer", sparsity=0.5, criterion="block_loss", data=data)
    assert set(once.dropped) == set(sorted(names, key=alone.__getitem__)[:2])
    first = min(names, key=alone.__getitem__)
    second = min((n for n in names if n != first), key=lambda n: loss_without(model, [first, n], data))
    greedy = sc.plan(model, pattern="layer", sparsity=0.5, criterion="block_loss", steps=2, data=data)
    assert set(greedy.dropped) == {first, second}


def test_criteria_of_weights_serve_blocks(problem):
    model, data = problem
    with torch.no_grad():
        model.blocks[2].up.weight.mul_(0.1)
    for criterion in ("magnitude", "taylor", "random"):
        plan = sc.plan(model, pattern="layer", sparsity=0.25, criterion=criterion, data=data)
        assert len(plan.dropped) == 1
        assert criterion != "magnitude" or plan.dropped == ("blocks.2",)


def test_ignored_and_forced_blocks(problem):
    model, data = problem
    keys = {"pattern": "layer", "criterion": "block_cosine", "data": data}
    assert sc.plan(model, sparsity=0.5, ignore=["blocks.1"], **keys).dropped == ("blocks.0", "blocks.3")
    assert sc.plan(model, sparsity=0.5, force=["blocks.2"], **keys).dropped == ("blocks.1", "blocks.2")
    assert sc.plan(model, force=["blocks.2"], **keys).dropped == ("blocks.2",)
    for changes, error, words in (
        ({"sparsity": 0.25, "force": ["blocks.2", "blocks.0"]}, RecipeError, "Raise it to 0.5"),
        ({"sparsity": 0.5, "force": ["blocks.9"]}, UnknownName, "blocks.9"),
        ({"sparsity": 0.5, "force": ["blocks.1"], "ignore": ["blocks.1"]}, RecipeError, "leaves alone"),
        ({"sparsity": 0.1}, LayerError, "0.125"),
        ({"sparsity": 0.95}, LayerError, "at least one"),
        ({"sparsity": 0.5, "allocation": "global"}, RecipeError, "allocation"),
        ({"sparsity": 0.5, "repair": "bias"}, RecipeError, "repair"),
        ({"sparsity": 0.5, "criterion": "fpgm"}, RecipeError, "channel"),
    ):
        with pytest.raises(error, match=words):
            sc.plan(model, **{**keys, **changes})
    with pytest.raises(RecipeError, match="'layer'"):
        sc.plan(model, pattern="channel", sparsity=0.5, criterion="block_loss", data=data)
    with pytest.raises(LayerError, match="ModuleList"):
        sc.plan(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), pattern="layer", sparsity=0.5, example=torch.randn(1, 4))


def test_the_artifact_loads_in_a_fresh_process_to_the_same_bits(problem, tmp_path):
    model, data = problem
    source = f"{__file__}:build"
    result = sc.prune(
        model, pattern="layer", sparsity=0.5, criterion="block_cosine", data=data, out=tmp_path / "run", source=source
    )
    with torch.no_grad():
        wanted = result.model(data[0][0])
        assert torch.equal(sc.load(tmp_path / "run", model=build())(data[0][0]), wanted)
        assert torch.equal(sc.load(tmp_path / "run", model=result.model)(data[0][0]), wanted)
    code = (
        "import torch, json, secateur as sc, sys\n"
        f"m = sc.load({str(tmp_path / 'run')!r})\n"
        "x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))[:12]\n"
        "print(json.dumps(m(x).tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert torch.equal(torch.tensor(json.loads(done.stdout)), wanted)


def test_units_that_have_to_go(problem):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    keys = {"pattern": "ffn", "example": torch.randn(1, 4)}
    with torch.no_grad():
        model[0].weight[[2, 5]] = 10
    plan = sc.plan(model, sparsity=0.5, force=["0[2,5]"], **keys)
    kept = next(c.kept for c in plan.cuts if c.tensor == "0.weight")
    assert len(kept) == 4
    assert not {2, 5} & set(kept)
    for sparsity, force, error, words in (
        (0.125, ["0[2,5]"], RecipeError, "fewer go"),
        (0.5, ["0[8]"], RecipeError, "output 8"),
        (0.5, ["0"], RecipeError, r"conv1\[3,5\]"),
        (0.5, ["2[0]"], UnknownName, "'2'"),
    ):
        with pytest.raises(error, match=words):
            sc.plan(model, sparsity=sparsity, force=force, **keys)
    with pytest.raises(RecipeError, match="cut units"):
        sc.plan(model, sparsity=0.5, force=["0[2]"])
