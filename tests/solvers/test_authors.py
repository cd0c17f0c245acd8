"""Whole decoders pruned by the library and by the authors' formulas written plainly: the same weights, or no worse an error."""

from __future__ import annotations

import copy

import pytest
import torch
from authors import prune_decoder

import secateur as sc
from secateur.job import prepare
from secateur.models.torchvision_shim import prepare_torchvision
from secateur.recipe import Recipe
from secateur.selection import choose

EXACT = ("magnitude", "wanda")  #: criteria alone, without a solver's rounding
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def decoder():
    prepare_torchvision()
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def data():
    return [{"input_ids": torch.randint(64, (4, 24), generator=torch.Generator().manual_seed(i))} for i in range(4)]


def ours(model, method, setting):
    options = {"pattern": setting} if ":" in setting else {"sparsity": float(setting), "allocation": "uniform"}
    if method == "wanda" and ":" not in setting:
        options["pattern"] = "row"
    options |= {"criterion": method} if method in EXACT else {"criterion": "magnitude", "solver": method}
    return sc.prune(model, data=data(), ignore=["lm_head"], **options).model


@pytest.mark.parametrize("setting", ["0.5", "2:4", "4:8"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_the_library_gives_what_the_formulas_give(decoder, method, setting):
    plain = copy.deepcopy(decoder)
    assert prune_decoder(plain, data(), method, setting) == pytest.approx(0.5, abs=1e-3)
    found = ours(decoder, method, setting)
    with torch.no_grad():
        dense, one, other = (torch.cat([m.model(**b).last_hidden_state for b in data()]) for m in (decoder, plain, found))
    errors = [float((x - dense).square().sum() / dense.square().sum()) for x in (one, other)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3 if method in EXACT else 0.05 if method == "sparsegpt" else 0.15)
    if method != "alps":
        pairs = list(zip(plain.model.layers.parameters(), found.model.layers.parameters(), strict=True))
        same = sum(int(((p == 0) == (q == 0)).sum()) for p, q in pairs)
        assert same >= 0.99 * sum(p.numel() for p, _ in pairs)


def test_each_block_is_chosen_by_what_it_reads_once_the_blocks_before_are_pruned(decoder):
    """The norms of the dense model choose otherwise; how much each layer keeps is the same."""
    found = ours(decoder, "wanda", "2:4")
    layers = [n for n, _ in decoder.named_parameters() if "proj" in n]
    job = prepare(decoder, Recipe.make(criterion="wanda", pattern="2:4", ignore=["lm_head"]), data=data())
    dense = choose(job.layers, job.statistics(decoder).layers, sparsity=job.sparsity, method=job.method)
    differ = {n for n in layers if not torch.equal(dense[n], found.get_parameter(n) != 0)}
    assert differ == {n for n in layers if "layers.1." in n}, "the first block reads the same"


def test_an_allocation_that_compares_layers_does_so_by_the_dense_model(decoder):
    options = {"criterion": "wanda", "pattern": "row", "allocation": "owl", "sparsity": 0.5, "ignore": ["lm_head"]}
    planned = sc.plan(decoder, data=data(), **options)
    pruned = sc.prune(decoder, data=data(), **options)
    kept = {n: int(m.count_nonzero()) for n, m in pruned.masks.items()}
    assert {p.name: p.kept for p in planned.layers} == kept
    assert len({round(k / pruned.masks[n].numel(), 3) for n, k in kept.items()}) > 1, "not the same share of each"
