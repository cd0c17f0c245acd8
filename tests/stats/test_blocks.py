"""Block by block: the same matrices as whole passes of the model give, on what the repaired weights hand on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.data.batches import Batches
from secateur.layers import find_layers
from secateur.models.torchvision_shim import prepare_torchvision
from secateur.stats import blocks as module
from secateur.stats import collect
from secateur.stats.blocks import find_blocks, inputs_in_turn
from secateur.types import Need


class Encoder(nn.Module):
    """Embedding, a stem, blocks that are given a scale by keyword, a head."""

    def __init__(self, block=None, count=3):
        super().__init__()
        self.embed, self.stem = nn.Embedding(9, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList([(block or Block)() for _ in range(count)])
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        hidden = self.stem(self.embed(input_ids))
        for i, block in enumerate(self.blocks):
            hidden = self.step(block, hidden, attention_mask, i)
        return self.head(hidden)

    def step(self, block, hidden, attention_mask, index):
        return block(hidden, scale=attention_mask[..., None].float())[0]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden, scale):
        return hidden + self.down(self.up(hidden) * self.gate(hidden).sigmoid()) * scale, None


class Numbered(Encoder):
    def step(self, block, hidden, attention_mask, index):
        return block(hidden, scale=float(index))[0]


class Shifted(Encoder):
    def step(self, block, hidden, attention_mask, index):
        return block(hidden, scale=torch.full((1,), float(index)))[0]


class Twice(Encoder):
    def step(self, block, hidden, attention_mask, index):
        return super().step(block, super().step(block, hidden, attention_mask, index), attention_mask, index)


def data():
    return [
        {"input_ids": torch.randint(9, (n, 5)), "attention_mask": (torch.arange(5) < torch.randint(2, 6, (n, 1))).long()}
        for n in (3, 2)
    ]


def change(layer):
    layer.parameter.data.mul_(0.9).add_(0.01)


def test_blocks_are_found_by_structure():
    assert find_blocks(Encoder(), find_layers(Encoder())[0]) == [["blocks.0", "blocks.1", "blocks.2"]]
    two = nn.ModuleDict({"a": Encoder(), "b": Encoder()})
    assert [names[0] for names in find_blocks(two, find_layers(two)[0])] == ["a.blocks.0", "b.blocks.0"]
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert find_blocks(plain, find_layers(plain)[0]) == []
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    assert find_blocks(encoder, find_layers(encoder)[0]) == [["layers.0", "layers.1"]]


@pytest.mark.parametrize("kind", [Encoder, Numbered, Shifted, Twice])
def test_each_layer_once_with_the_inputs_that_changed_weights_give(kind, caplog):
    """Shifted and Twice cannot be replayed, which is said; the matrices are right all the same."""
    torch.manual_seed(0)
    model, batches = kind(), Batches(data())
    layers, seen, parts = find_layers(model)[0], [], []
    for part in inputs_in_turn(model, layers, batches):
        parts.append(list(part))
        expected = collect(model, layers, {Need.GRAM}, batches=batches).layers
        for name, gram in part.items():
            torch.testing.assert_close(gram, expected[name].gram, rtol=1e-4, atol=1e-4)
            seen.append(name)
            change(layers[name])
        if "blocks.0.up.weight" in part:
            assert part["blocks.0.up.weight"] is part["blocks.0.gate.weight"]
    assert sorted(seen) == sorted(layers)
    inner = [sorted(f"blocks.{i}.{n}.weight" for n in ("up", "gate", "down")) for i in range(3)]
    assert [sorted(part) for part in parts] == [["stem.weight"], *inner, ["head.weight"]]
    assert ("not replayed one by one" in caplog.text) == (kind in (Shifted, Twice))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_what_is_done_is_passed_through_but_not_collected():
    model, batches = Encoder(), Batches(data())
    layers = find_layers(model)[0]
    done = {n for n in layers if n.startswith(("stem", "blocks.0", "blocks.1.up"))}
    found = {}
    for part in inputs_in_turn(model, layers, batches, done=done):
        found |= part
    assert set(found) == set(layers) - done
    expected = collect(model, layers, {Need.GRAM}, batches=batches).layers
    for name, gram in found.items():
        torch.testing.assert_close(gram, expected[name].gram, rtol=1e-4, atol=1e-4)


def test_without_blocks_passes_hold_as_many_layers_as_memory_allows(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    batches = Batches([torch.randn(6, 4)])
    layers = find_layers(model)[0]
    assert [list(p) for p in inputs_in_turn(model, layers, batches)] == [["0.weight", "2.weight", "4.weight"]]
    monkeypatch.setattr(module, "total_memory", lambda: 10 * 2 * 4 * 4 * 12)
    assert [list(p) for p in inputs_in_turn(model, layers, batches)] == [["0.weight", "2.weight"], ["4.weight"]]


def test_a_decoder_with_a_cache_is_replayed(caplog):
    transformers = pytest.importorskip("transformers")
    prepare_torchvision()
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    batches = Batches([{"input_ids": torch.randint(32, (2, 7))}, {"input_ids": torch.randint(32, (2, 7))}])
    layers = find_layers(model)[0]
    count = 0
    for part in inputs_in_turn(model, layers, batches):
        expected = collect(model, {n: layers[n] for n in part}, {Need.GRAM}, batches=batches).layers
        for name, gram in part.items():
            torch.testing.assert_close(gram, expected[name].gram, rtol=1e-3, atol=1e-3)
            change(layers[name])
        count += 1
    assert count == 4, "three blocks and the head"
    assert model.config.use_cache
    assert "not replayed" not in caplog.text


class Scaled(Block):
    factor = 1.0

    def forward(self, hidden, scale):
        return super().forward(hidden, scale)[0] * self.factor, None


class Rewritten(Encoder):
    """Its last block gives something else inside the model than by itself."""

    def __init__(self):
        super().__init__(Scaled)

    def forward(self, input_ids, attention_mask):
        self.blocks[-1].factor = 2.0
        try:
            return super().forward(input_ids, attention_mask)
        finally:
            self.blocks[-1].factor = 1.0


def test_the_self_check_looks_at_the_last_block_too(caplog):
    model, batches = Rewritten(), Batches(data())
    layers = find_layers(model)[0]
    expected = collect(model, layers, {Need.GRAM}, batches=batches).layers
    for part in inputs_in_turn(model, layers, batches):
        for name, gram in part.items():
            torch.testing.assert_close(gram, expected[name].gram, rtol=1e-4, atol=1e-4)
    assert "the last gives something else by itself" in caplog.text


def test_a_long_calibration_is_announced(monkeypatch, caplog):
    monkeypatch.setattr(module, "_LONG", 0.0)
    model = Encoder()
    list(inputs_in_turn(model, find_layers(model)[0], Batches(data())))
    assert "calibrating 3 blocks: about 0 min without the solver" in caplog.text
