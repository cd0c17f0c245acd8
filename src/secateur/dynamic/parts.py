"""Feed-forward and attention parts of decoder blocks, found by the shapes and names of their linear layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from secateur.layers import Layer, find_layers
from secateur.stats.blocks import within

#: Last layers of attentions, and their first layers that make queries alone, in transformers.
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "out_lin")
_QUERIES = ("q_proj", "query", "q", "q_lin", "wq")
_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads")


@dataclass(frozen=True)
class Part:
    """Layers whose outputs are units (neurons, heads), and the one that reads these units; names of weights."""

    before: tuple[str, ...]
    after: str
    units: int
    size: int  #: features of a unit


def feed_forward(model: nn.Module, block: str) -> Part | None:
    """One or two layers ``d -> n`` and one ``n -> d`` that are children of one module, with no other linear layer there."""
    for layers in _siblings(model, block):
        for after, last in reversed(layers.items()):  # of two, the later one reads the units
            out, inside = last.shape[0], last.shape[1]
            before = tuple(n for n, layer in layers.items() if n != after and tuple(layer.shape) == (inside, out))
            if inside != out and 1 <= len(before) == len(layers) - 1 <= 2:
                return Part(before, after, inside, 1)
    return None


def attention(model: nn.Module, block: str) -> Part | None:
    """The layer that reads the heads, and the one that makes the queries where it makes nothing else."""
    for layers in _siblings(model, block):
        local = {name.split(".")[-2]: name for name in layers}
        after = next((local[n] for n in _OUTPUTS if n in local), None)
        if after is None or len(layers) < 2:
            continue
        heads = _heads(model, layers[after].module_name)
        width = layers[after].shape[1]
        if heads is None or heads < 2 or width % heads:
            continue
        query = next((local[n] for n in _QUERIES if n in local and layers[local[n]].shape[0] == width), None)
        return Part((query,) if query else (), after, heads, width // heads)
    return None


def _siblings(model: nn.Module, block: str) -> list[dict[str, Layer]]:
    """The linear layers of a block, those of each parent module together."""
    layers = find_layers(model)[0]
    found: dict[str, dict[str, Layer]] = {}
    for name in within(block, layers):
        if isinstance(layers[name].module, nn.Linear) or layers[name].swap:
            found.setdefault(layers[name].module_name.rpartition(".")[0], {})[name] = layers[name]
    return list(found.values())


def _heads(model: nn.Module, module_name: str) -> int | None:
    """How many heads the attention above the module has, by itself or by its configuration."""
    parent = model.get_submodule(module_name.rpartition(".")[0])
    for place in (parent, getattr(parent, "config", None), getattr(model, "config", None)):
        for name in _HEADS:
            if isinstance(value := getattr(place, name, None), int):
                return value
    return None
