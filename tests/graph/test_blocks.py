from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import LayerError, ModelError, UnknownName
from secateur.graph import cut, drop_blocks, trace
from secateur.graph.blocks import block_importance, bypass_difference, bypassed_output, plan_without, removable_blocks
from secateur.types import Plan


class Block(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = scale

    def forward(self, x):
        return x + self.scale * self.down(F.relu(self.up(self.norm(x))))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([Block(s) for s in (1.0, 1e-3, 2.0)])
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_only_blocks_with_a_shortcut_can_be_taken_out():
    model = Network()
    assert [b.name for b in removable_blocks(model, trace(model, torch.randn(2, 4)))] == ["blocks.0", "blocks.1", "blocks.2"]


def test_the_block_that_changes_least_matters_least():
    model, x = Network(), torch.randn(16, 4)
    importance = block_importance(model, removable_blocks(model, trace(model, x)), [x])
    assert min(importance, key=importance.get) == "blocks.1"
    assert 0 <= importance["blocks.1"] < 1e-4
    assert not any(m._forward_hooks for m in model.modules())


def test_padding_has_no_part_in_how_much_a_block_changes():
    class Masked(Network):
        def forward(self, x, attention_mask=None):
            return super().forward(x)

    model, x = Masked(), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    blocks = removable_blocks(model, trace(model, x))
    alone = block_importance(model, blocks, [x[mask.bool()][None]])
    assert block_importance(model, blocks, [{"x": x, "attention_mask": mask}]) == pytest.approx(alone, rel=1e-5, abs=1e-6)
    assert block_importance(model, blocks, [x]) != pytest.approx(alone, rel=1e-3)


def test_a_model_without_blocks_equals_the_original_that_bypasses_them():
    model, x = Network(), torch.randn(5, 4)
    plan = Plan.from_json(json.loads(json.dumps(plan_without(trace(model, x), model, ["blocks.0", "blocks.2"]).to_json())))
    smaller = cut(model, plan)
    assert len(smaller.blocks) == 1
    assert len(model.blocks) == 3
    with torch.no_grad():
        assert torch.equal(smaller(x), bypassed_output(model, plan.dropped, x)[0])


def test_all_blocks_or_unknown_ones_are_refused():
    model = Network()
    graph = trace(model, torch.randn(1, 4))
    with pytest.raises(LayerError, match="at least one"):
        plan_without(graph, model, ["blocks.0", "blocks.1", "blocks.2"])
    with pytest.raises(UnknownName, match=r"blocks\.1"):
        plan_without(graph, model, ["blocks.11"])


def test_a_block_that_others_need_is_refused():
    class Shares(Network):
        def forward(self, x):
            return self.head(self.blocks[1](self.blocks[0](self.stem(x)))) * self.blocks[0].scale

    drop_blocks(Network(), torch.randn(2, 4), ["blocks.1"])
    with pytest.raises(ModelError, match="differs from the original"):
        drop_blocks(Shares(), torch.randn(2, 4), ["blocks.1"])


def test_of_a_stage_the_blocks_inside_count():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())

        def forward(self, x):
            return self.blocks(x)

    class Parts(nn.Module):
        """As T5's: two residual parts in a list, which the block calls by number."""

        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            return self.parts[1](self.parts[0](x))

    def names(*members):
        model = nn.Sequential(*members)
        return [b.name for b in removable_blocks(model, trace(model, torch.randn(2, 8)))]

    assert names(Stage(), Stage()) == ["0.blocks.0", "0.blocks.1", "1.blocks.0", "1.blocks.1"]
    assert names(Parts(), Parts()) == ["0", "1"]
    assert names(Stage(), Block()) == ["0.blocks.0", "0.blocks.1", "1"]


def test_a_model_that_gives_nan_without_its_blocks_is_not_taken_for_the_original():
    model, x = nn.Sequential(nn.Linear(8, 8), Block(), Block()).eval(), torch.randn(2, 8)
    smaller, plan = drop_blocks(model, x, ["2"])
    with torch.no_grad():
        smaller[0].bias[0] = torch.nan
    assert bypass_difference(model, smaller, plan, x) == torch.inf
