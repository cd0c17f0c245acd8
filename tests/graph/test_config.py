from __future__ import annotations

import pytest
import torch

from secateur.errors import ModelError
from secateur.graph import fit_config, prune_channels
from secateur.models.torchvision_shim import prepare_torchvision

SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
}


def small(name: str):
    prepare_torchvision()
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SMALL))
    return model.eval(), {"input_ids": torch.randint(3, 99, (2, 7))}


def test_configuration_of_a_cut_llama_builds_it_again():
    model, example = small("Llama")
    before = {name: p.shape for name, p in model.named_parameters()}
    smaller, _ = prune_channels(model, example, 0.5, kinds=("head", "neuron"))
    assert fit_config(smaller, before, example) == {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
    }
    assert model.config.intermediate_size == 96
    fresh = type(smaller)(smaller.config).eval()
    fresh.load_state_dict(smaller.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(**example).logits, smaller(**example).logits)


def test_same_shapes_are_not_enough():
    """A cut model scales its embeddings by the root of the width it had; one built anew by the root of the new one."""
    model, example = small("Gemma")
    before = {name: p.shape for name, p in model.named_parameters()}
    smaller, _ = prune_channels(model, example, 0.5, kinds=("width",))
    with pytest.raises(ModelError, match="no configuration"):
        fit_config(smaller, before, example)
