"""Whole decoders pruned by the library and by the authors' formulas written plainly: the same weights, or no worse an error."""

from __future__ import annotations

import copy

import pytest
import torch
from authors import prune_decoder

import secateur as sc
from secateur.models.torchvision_shim import prepare_torchvision

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
    options |= {"criterion": "magnitude"} | ({} if method == "magnitude" else {"solver": method})
    return sc.prune(model, data=data(), ignore=["lm_head"], **options).model


@pytest.mark.parametrize("setting", ["0.5", "2:4", "4:8"])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "alps"])
def test_the_library_gives_what_the_formulas_give(decoder, method, setting):
    plain = copy.deepcopy(decoder)
    assert prune_decoder(plain, data(), method, setting) == pytest.approx(0.5, abs=1e-3)
    found = ours(decoder, method, setting)
    with torch.no_grad():
        dense, one, other = (torch.cat([m.model(**b).last_hidden_state for b in data()]) for m in (decoder, plain, found))
    errors = [float((x - dense).square().sum() / dense.square().sum()) for x in (one, other)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3 if method == "magnitude" else 0.05 if method == "sparsegpt" else 0.15)
    if method != "alps":
        pairs = list(zip(plain.model.layers.parameters(), found.model.layers.parameters(), strict=True))
        same = sum(int(((p == 0) == (q == 0)).sum()) for p, q in pairs)
        assert same >= 0.99 * sum(p.numel() for p, _ in pairs)
