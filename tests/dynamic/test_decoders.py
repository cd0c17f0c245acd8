"""TEAL and DejaVu on decoders: the kernels against masks, what is chosen, and whom it serves."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dynamic_cases import llama, residual, tokens, vectors
from torch import nn

import secateur as sc
from secateur.dynamic import teal
from secateur.dynamic.chosen import ChosenInputs, ChosenOutputs
from secateur.dynamic.sparse_input import SparseInput
from secateur.errors import ModelError, RecipeError
from secateur.models.torchvision_shim import prepare_torchvision
from secateur.runtime import native

OPTIONS = {"teal": {"positions": 48, "step": 0.25}, "dejavu": {"rank": 2, "steps": 20}}
needs_kernels = pytest.mark.skipif(not native.gathers(), reason="the compiled kernels are missing or from before these")


def decoded(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of each position, one at a time by the cache."""
    past, found = None, []
    for token in ids.split(1, 1):
        out = model(input_ids=token, past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


@needs_kernels
@pytest.mark.parametrize("method", OPTIONS)
def test_decoding_by_the_kernels_is_the_masked_computation(method, monkeypatch):
    gated = sc.dynamic(llama(), method=method, data=tokens(), budget=0.5, **OPTIONS[method])
    ids = tokens()[0]["input_ids"][:1]
    calls = []

    def count(name, kernel):
        monkeypatch.setattr(native, name, lambda *args, **kw: calls.append(name) or kernel(*args, **kw))

    for name in ("thin", "gather", "combine"):
        count(name, getattr(native, name))
    with torch.inference_mode():
        by_kernels = decoded(gated, ids)
        assert set(calls) == ({"thin"} if method == "teal" else {"gather", "combine"})
        calls.clear()
        at_once = gated(input_ids=ids).logits
        monkeypatch.setattr(native, "_extension", None)
        by_torch = decoded(gated, ids)
    assert not calls
    torch.testing.assert_close(by_kernels, by_torch, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_kernels, at_once, rtol=1e-4, atol=1e-4)


def far(gate, linear, x):
    return (x - gate.centre).abs() * linear.weight.norm(dim=0) > gate.threshold


def test_teal_equals_a_hand_made_mask_and_costs_what_is_left():
    gated = sc.dynamic(residual(), method="teal", data=vectors(), budget=0.6, **OPTIONS["teal"])
    x, dense = vectors()[0], residual()
    with torch.no_grad(), gated.recording() as costs:
        found = gated(x)
        hidden, left = dense[0](x), torch.zeros(4)
        for block, other in zip(dense[1], gated.model[1], strict=True):
            keep = far(other.up, block.up, hidden)
            inside = F.relu(block.up(torch.where(keep, hidden, other.up.centre)))
            also = far(other.down, block.down, inside)
            left += 64 * keep.sum(1) + 16 * also.sum(1)
            hidden = hidden + block.down(torch.where(also, inside, other.down.centre))
    torch.testing.assert_close(found, dense[2](hidden))
    assert costs.computed.tolist() == left.tolist()
    assert costs.dense.tolist() == [3 * 2 * 16 * 64] * 4


def test_teal_gives_the_sparsity_to_layers_that_bear_it():
    """Half of the inputs of `down` are exact zeros after the ReLU: leaving them out is free, so that layer goes first."""
    gated = sc.dynamic(residual(), method="teal", data=vectors(), budget=0.8, **OPTIONS["teal"])
    for block in gated.model[1]:
        assert float(block.down.way[60]) > float(block.up.way[60])


def test_teal_is_better_than_the_same_sparsity_everywhere():
    model, data = residual(), vectors()
    gated = sc.dynamic(model, method="teal", data=data, budget=0.6, **OPTIONS["teal"])
    with torch.inference_mode():
        wanted = [model(x) for x in data]
        greedy = sum(float((gated(x) - y).square().sum()) for x, y in zip(data, wanted, strict=True))
        for gate in gated.gates.values():
            gate.set_sparsity(0.4)
        uniform = sum(float((gated(x) - y).square().sum()) for x, y in zip(data, wanted, strict=True))
    assert greedy < 0.7 * uniform


def test_dejavu_finds_gated_feed_forwards_heads_and_grouped_keys():
    gated = sc.dynamic(llama(), method="dejavu", data=tokens(), budget=0.6, **OPTIONS["dejavu"])
    block = gated.model.model.layers[0]
    for name in ("gate_proj", "up_proj"):
        assert isinstance(getattr(block.mlp, name), ChosenOutputs)
    assert isinstance(block.mlp.down_proj, ChosenInputs)
    assert isinstance(block.self_attn.q_proj, ChosenOutputs)
    assert isinstance(block.self_attn.o_proj, ChosenInputs)
    assert block.self_attn.o_proj.choice.units == 4
    assert type(block.self_attn.k_proj) is nn.Linear


def test_dejavu_equals_a_model_without_the_neurons_that_were_not_chosen():
    gated = sc.dynamic(residual(), method="dejavu", data=vectors(), budget=0.6, rank=2, steps=20)
    x, dense = vectors()[0][:1], residual()
    with torch.no_grad():
        found, hidden = gated(x), dense[0](x)
        for block, other in zip(dense[1], gated.model[1], strict=True):
            keep = torch.zeros(64).index_fill(0, other.up.choice.chosen.flatten(), 1)
            assert 0 < int(keep.sum()) < 64
            hidden = hidden + block.down(F.relu(block.up(hidden)) * keep)
    torch.testing.assert_close(found, dense[2](hidden))


def test_dejavu_learns_who_is_needed():
    """Three quarters of the neurons add nothing: they are the ones left out, and the output stays as it was."""
    model = residual()
    with torch.no_grad():
        for block in model[1]:
            block.down.weight[:, ::4] *= 10
            block.down.weight[:, [i for i in range(64) if i % 4]] *= 0.001
    gated = sc.dynamic(model, method="dejavu", data=vectors(), budget=0.5, rank=2, active=0.25, steps=300, lr=0.01)
    with torch.inference_mode():
        for x in vectors():
            torch.testing.assert_close(gated(x), model(x), rtol=1e-2, atol=1e-2)
    assert 16 <= gated.model[1][0].up.choice.chosen.shape[-1] < 32


def test_dejavu_refuses_a_budget_below_its_predictors_and_keeps_the_old_one():
    gated = sc.dynamic(residual(), method="dejavu", data=vectors(), budget=0.6, rank=4, steps=2)
    before = copy.deepcopy([g.counts for g in gated.gates.values() if hasattr(g, "counts")])
    with pytest.raises(RecipeError, match="predictors themselves cost"):
        gated.budget = 0.05
    assert gated.budget == 0.6
    assert [g.counts for g in gated.gates.values() if hasattr(g, "counts")] == before


@pytest.mark.parametrize(("method", "options"), [("teal", {"step": 0}), ("teal", {"positions": 0}), ("dejavu", {"ahead": 2})])
def test_options_out_of_range_are_refused(method, options):
    with pytest.raises(RecipeError, match=r"out of range|at least"):
        sc.dynamic(residual(), method=method, data=vectors(), **options)


def test_a_threshold_above_every_input_leaves_what_the_centres_give():
    layer, seen = nn.Linear(4, 3), torch.randn(11, 4)
    gate = SparseInput(layer)
    gate.learn(seen)
    gate.set_sparsity(1.0)
    with torch.inference_mode():
        usual = layer(seen.median(0).values[None])
        torch.testing.assert_close(gate(seen[:1]), usual)
        torch.testing.assert_close(gate(seen[:3]), usual.expand(3, 3))
    with torch.no_grad():
        layer.weight.mul_(2)
    with torch.inference_mode():
        torch.testing.assert_close(gate(seen[:1]), layer(seen.median(0).values[None]))


def test_columns_without_weights_are_never_read():
    layer = nn.Linear(40, 8)
    with torch.no_grad():
        layer.weight[:, ::4] = 0
    gate, seen = SparseInput(layer), torch.randn(50, 40)
    gate.learn(seen)
    gate.set_sparsity(0.25)
    with torch.inference_mode():
        torch.testing.assert_close(gate(seen), layer(seen))
        torch.testing.assert_close(gate(seen[:1]), layer(seen[:1]))


def test_blocks_go_their_ways_by_what_they_save():
    """Two blocks of the same size; the second errs a hundred times as much: it starts when the first is through."""
    gates = [SparseInput(nn.Linear(4, 4)) for _ in range(2)]
    points = [(0.0,), (0.5,), (0.95,), (1.0,)]
    teal._between_blocks([teal._Way([g], points, [0.0, e, 4 * e]) for g, e in zip(gates, (0.01, 1.0), strict=True)])
    at = [[round(float(g.way[i]), 3) for i in (0, 50, 95, 145, 190, 200)] for g in gates]
    assert at == [[0.0, 0.5, 0.95, 0.95, 0.95, 1.0], [0.0, 0.0, 0.0, 0.5, 0.95, 1.0]]


def test_the_lower_convex_hull():
    x, y = [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 3.0, 1.5, 2.5, 6.0]
    assert teal._hull(x, y) == [0, 2, 3, 4]


def test_gradients_pass_through_the_masks():
    gated = sc.dynamic(residual(), method="teal", data=vectors(), budget=0.6, **OPTIONS["teal"])
    gated(vectors()[0][:1]).sum().backward()
    assert all(p.grad is not None for p in gated.parameters())


@pytest.mark.parametrize("method", OPTIONS)
def test_gpt2_stores_its_weights_the_other_way_round(method):
    prepare_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    gated = sc.dynamic(model, method=method, data=tokens(), budget=0.5, **OPTIONS[method])
    ids = tokens()[0]["input_ids"][:1]
    with torch.inference_mode():
        torch.testing.assert_close(decoded(gated, ids), gated(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        gated.budget = 1.0
        torch.testing.assert_close(gated(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", OPTIONS)
def test_padding_changes_nothing_that_is_learnt(method):
    data = [{"input_ids": torch.cat([b["input_ids"], torch.zeros(3, 5, dtype=torch.long)], 1)} for b in tokens()]
    for batch in data:
        batch["attention_mask"] = torch.ones(3, 21, dtype=torch.long)
        batch["attention_mask"][:, 16:] = 0
    found = [sc.dynamic(llama(), method=method, data=d, budget=0.6, **OPTIONS[method]) for d in (data, tokens())]
    for name, buffer in found[0].named_buffers():
        torch.testing.assert_close(buffer, dict(found[1].named_buffers())[name], rtol=1e-3, atol=1e-3)


def test_a_model_that_generates_and_a_model_without_blocks():
    gated = sc.dynamic(llama(), method="teal", data=tokens(), budget=0.6, **OPTIONS["teal"])
    ids = tokens()[0]["input_ids"][:1]
    with gated.recording() as costs:
        found = gated.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert found.shape == (1, 20)
    assert len(costs) == 4
    with pytest.raises(ModelError, match="repeated blocks"):
        sc.dynamic(nn.Linear(3, 3), method="teal", data=[torch.ones(2, 3)])
