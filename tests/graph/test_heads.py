"""Heads of attentions that compute their sizes from their width: rewritten forwards, and nn.MultiheadAttention."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import LayerError, ModelError
from secateur.graph import cut, prune_channels, recut, trace
from secateur.graph.heads import explicit_heads
from secateur.models.torchvision_shim import prepare_torchvision
from secateur.types import Plan

rewriting = pytest.mark.skipif(sys.version_info < (3, 11), reason="code knows its columns from Python 3.11 on")


def merged(x, size):
    b, _, n, _ = x.shape
    return x.transpose(1, 2).reshape(b, n, size)


class Attention(nn.Module):
    """As older vision transformers write it: everything from the width of the input."""

    def __init__(self, dim=24, heads=6):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = q * (c // self.num_heads) ** -0.5
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(merged(y, c))


@rewriting
def test_sizes_that_no_attribute_gives_are_rewritten():
    model = nn.Sequential(Attention(), nn.ReLU(), nn.Linear(24, 5)).eval()
    smaller, plan = prune_channels(model, torch.randn(2, 7, 24), 0.5, kinds=("head",))
    assert smaller[0].num_heads == 3
    assert smaller[0].qkv.weight.shape == (36, 24)
    assert {(r.functions[-1], r.value) for r in plan.rewrites} == {("forward", -1), ("forward", 4), ("merged", -1)}
    assert type(model[0]) is Attention
    assert isinstance(smaller[0], Attention)


@rewriting
def test_rewritten_models_are_restored_by_their_plan_and_can_be_cut_again():
    model = nn.Sequential(Attention(), nn.ReLU(), nn.Linear(24, 5)).eval()
    x = torch.randn(2, 7, 24)
    smaller, plan = prune_channels(model, x, 0.5, kinds=("head",))
    restored = recut(
        nn.Sequential(Attention(), nn.ReLU(), nn.Linear(24, 5)), Plan.from_json(json.loads(json.dumps(plan.to_json())))
    )
    restored.load_state_dict(smaller.state_dict())
    assert torch.equal(restored.eval()(x), smaller(x))
    assert torch.equal(copy.deepcopy(smaller)(x), smaller(x))
    again, _ = prune_channels(smaller, x, 0.4, kinds=("head",))
    assert again[0].num_heads == 2
    with torch.no_grad():
        assert again(torch.randn(3, 5, 24)).shape == (3, 5, 5)


@rewriting
def test_another_source_is_refused():
    model = nn.Sequential(Attention(), nn.ReLU(), nn.Linear(24, 5)).eval()
    _, plan = prune_channels(model, torch.randn(2, 7, 24), 0.5, kinds=("head",))
    data = plan.to_json()
    data["rewrites"][0]["call"] = "x.reshape(9)"
    with pytest.raises(ModelError, match="Its library has changed"):
        cut(model, Plan.from_json(json.loads(json.dumps(data))))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kdim", [None, 10])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "heads"])
def test_explicit_heads_do_what_torch_does(batch_first, need_weights, kdim, masks):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, batch_first=batch_first, kdim=kdim, vdim=kdim).eval()
    nn.init.normal_(attention.in_proj_bias)
    q, kv = torch.randn(2, 5, 12), torch.randn(2, 7, kdim or 12)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    mask = torch.rand(2 * 3 if masks == "heads" else 5, *((5, 7) if masks == "heads" else (7,))) > 0.7
    mask[..., 0] = False
    options = {"need_weights": need_weights}
    if masks != "none":
        options |= {"key_padding_mask": padding, "attn_mask": mask}
    if masks == "float":
        options = {k: torch.zeros(v.shape).masked_fill(v, -2.0) if torch.is_tensor(v) else v for k, v in options.items()}
    if not batch_first:
        q, kv = q.transpose(0, 1), kv.transpose(0, 1)
    wanted = attention(q, kv, kv, **options)
    with explicit_heads([attention]):
        found = attention(q, kv, kv, **options)
    torch.testing.assert_close(found[0], wanted[0])
    assert (found[1] is None) == (wanted[1] is None)
    if need_weights:
        torch.testing.assert_close(found[1], wanted[1])
    assert type(attention) is nn.MultiheadAttention


def test_heads_of_a_transformer_encoder_layer_go():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()
    model = nn.Sequential(nn.Linear(6, 16), layer, nn.Linear(16, 3)).eval()
    x = torch.randn(2, 5, 6)
    smaller, plan = prune_channels(model, x, 0.5, kinds=("head", "neuron"))
    attention = smaller[1].self_attn
    assert (attention.num_heads, attention.in_proj_weight.shape[0]) == (2, 3 * 8)
    assert smaller[1].linear1.out_features == 12
    fresh = nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), nn.Linear(16, 3))
    recut(fresh, plan).load_state_dict(smaller.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), smaller(x))
    again, _ = prune_channels(smaller, x, 0.5, kinds=("head",))
    assert again[1].self_attn.num_heads == 1


def test_heads_without_a_batch_and_the_width_around_them():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.attention, self.last = nn.Linear(6, 16), nn.MultiheadAttention(16, 4), nn.Linear(16, 3)

        def forward(self, x):
            y = self.inner(x)
            return self.last(y + self.attention(y, y, y)[0])

    smaller, _ = prune_channels(Model().eval(), torch.randn(5, 6), 0.5, kinds=("width",))
    assert smaller.attention.embed_dim == 8
    assert smaller.attention.in_proj_weight.shape == (48, 8)
    assert smaller(torch.randn(9, 6)).shape == (9, 3)


@rewriting
def test_swin_loses_half_of_its_heads():
    prepare_torchvision()
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    attention = ShiftedWindowAttention(16, [4, 4], [2, 2], 4).eval()
    smaller, _ = prune_channels(nn.Sequential(attention, nn.GELU()), torch.randn(1, 8, 8, 16), 0.5, kinds=("head",))
    assert smaller[0].num_heads == 2
    assert F.gelu(attention(torch.randn(2, 12, 12, 16))).shape == smaller(torch.randn(2, 12, 12, 16)).shape


FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "use_cache": False}


def pruned_heads(kind, config):
    prepare_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config)).eval()
    return prune_channels(model, {"input_ids": torch.randint(0, 64, (2, 9))}, 0.5, kinds=("head",))  # which compares


def test_falcon_loses_queries_of_its_one_key_and_value():
    smaller, _ = pruned_heads("Falcon", FALCON)
    attention = smaller.transformer.h[0].self_attention
    assert attention.num_heads == 2
    assert attention.query_key_value.weight.shape == (2 * 8 + 16, 32)


def test_falcon_loses_groups_and_queries_of_every_group():
    grouped = {**FALCON, "num_attention_heads": 8, "num_kv_heads": 2, "new_decoder_architecture": True}
    smaller, _ = pruned_heads("Falcon", grouped)
    attention = smaller.transformer.h[0].self_attention
    assert (attention.num_heads, attention.num_kv_heads) == (4, 2)
    assert attention.query_key_value.weight.shape == (2 * (2 + 2) * 4, 32)


def test_codegen_loses_heads_of_every_partition():
    smaller, _ = pruned_heads("CodeGen", {"n_embd": 32, "n_layer": 1, "n_head": 8, "vocab_size": 64, "rotary_dim": 2})
    assert smaller.transformer.h[0].attn.num_attention_heads == 4


def test_position_biases_made_for_so_many_heads_keep_them():
    alibi = {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False}
    with pytest.raises(LayerError, match="mask cannot be cut"):
        pruned_heads("Falcon", alibi)


def test_indices_that_are_written_down_keep_what_they_count_over():
    class Picks(nn.Module):
        def __init__(self, places):
            super().__init__()
            self.first, self.places, self.last = nn.Linear(4, 8), places, nn.Linear(2, 3)

        def forward(self, x):
            return self.last(self.first(x)[:, self.places])

    x = torch.randn(2, 4)
    for places, free in (([0, 2], 5), ([-1, -3], 5), ([1, -1], 0)):
        model = Picks(places)
        graph = trace(model, x)
        assert sum(g.units for g in graph.units()) == free
        if free:
            smaller, _ = prune_channels(model, x, 0.99, min_width=1)
            assert torch.allclose(smaller(x), model(x), atol=1e-6)
