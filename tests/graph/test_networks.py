"""Whole networks: each is cut by half and must equal its masked original (prune_channels raises where it does not)."""

from __future__ import annotations

import pytest
import torch

from secateur.graph import prune_channels
from secateur.models.torchvision_shim import prepare_torchvision


def torchvision_model(name: str):
    prepare_torchvision()
    return pytest.importorskip("torchvision.models").get_model(name, weights=None)


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "most_left"),
    [("resnet18", 0.3), ("mobilenet_v2", 0.4), ("shufflenet_v2_x0_5", 0.5), ("densenet121", 0.35), ("regnet_y_400mf", 0.35)],
)
def test_torchvision(name, most_left):
    model = torchvision_model(name)
    smaller, plan = prune_channels(model, torch.randn(1, 3, 64, 64), 0.5)
    assert parameters(smaller) <= most_left * parameters(model)
    assert plan.cuts


SMALL = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
GPT2 = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.mark.parametrize(
    ("config", "model", "options", "heads"),
    [
        ("LlamaConfig", "LlamaForCausalLM", SMALL | {"num_key_value_heads": 2}, 32),
        ("BertConfig", "BertForSequenceClassification", SMALL, 32),
        ("GPT2Config", "GPT2LMHeadModel", GPT2, None),
    ],
)
def test_transformers(config, model, options, heads):
    prepare_torchvision()
    transformers = pytest.importorskip("transformers")
    built = getattr(transformers, model)(getattr(transformers, config)(**options))
    smaller, plan = prune_channels(built, {"input_ids": torch.randint(0, 99, (2, 9))}, 0.5, kinds=("head", "neuron"))
    assert parameters(smaller) < 0.8 * parameters(built)
    if heads is not None:
        assert any(
            c.tensor.endswith(("q_proj.weight", "query.weight")) and c.dim == 0 and len(c.kept) == heads for c in plan.cuts
        )
