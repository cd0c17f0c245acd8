"""Through what the slices of a group hang together: the operations between them, in words and by module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from secateur.graph.labels import Array, Dim
from secateur.graph.trace import Node, Value

if TYPE_CHECKING:
    from secateur.graph.graph import Graph

_PRODUCTS = frozenset({"mm", "bmm", "matmul", "addmm", "baddbmm", "linear", "convolution", "mkldnn_rnn_layer", "_grouped_mm"})
_WORDS = {
    "add": "added in",
    "sub": "added in",
    "mul": "multiplied in",
    "div": "multiplied in",
    "cat": "concatenated in",
    "stack": "stacked in",
    "split": "split in",
    "split_with_sizes": "split in",
    "chunk": "split in",
    "glu": "gated in",
    "slice": "sliced in",
    "pixel_shuffle": "shuffled in",
    "pixel_unshuffle": "shuffled in",
    "native_channel_shuffle": "shuffled in",
    "embedding": "looked up in",
    "native_batch_norm": "normalised by",
    "_native_batch_norm_legit_no_training": "normalised by",
    "native_layer_norm": "normalised by",
    "native_group_norm": "normalised by",
    "_fused_rms_norm": "normalised by",
}
_TWO_SIDED = frozenset({"add", "sub", "mul", "div"})

Links = dict[str, tuple[str, ...]]


def links_of(graph: Graph) -> dict[int, Links]:
    """For each group what ties it together: ``{"made by": ("conv1",), "added in": ("layer1.0", "layer1.1"), ...}``.

    "made by" and "read by" name the layers whose outputs and inputs a unit is; the others name the modules in which the
    operation happens that makes the slices live or die together.
    """
    if graph.links is None:
        graph.links = _find(graph)
    return graph.links


def _find(graph: Graph) -> dict[int, Links]:
    said: dict[tuple[int, str, str], Array] = {}
    for node in graph.recording.nodes:
        for dim, words in _words(graph, node):
            if dim is not None:
                said.setdefault((id(dim), words, node.module or "the model itself"), dim)
    arrays = {id(dim): dim for dim in said.values()}
    groups = {key: graph.groups_of(dim) for key, dim in arrays.items()}
    found: dict[int, dict[str, dict[str, None]]] = {}
    for key, words, module in said:
        for group in groups[key]:
            found.setdefault(group, {}).setdefault(words, {})[module] = None
    return {g: {words: tuple(where) for words, where in links.items()} for g, links in found.items()}


def _words(graph: Graph, node: Node) -> Iterator[tuple[Dim, str]]:
    """What an operation has to say about the dimensions it touches."""
    if node.name not in _PRODUCTS and node.name not in _WORDS and "attention" not in node.name:
        return
    tensors = node.tensors
    outputs = [own for value in node.outputs for own in value.labels or ()]
    if node.name in _PRODUCTS:
        yield from _of_product(graph, node, tensors, outputs)
    elif "attention" in node.name:
        yield from ((own, "attended in") for own in outputs)
    elif node.name in _TWO_SIDED:
        sides = [t for t in tensors if not graph.coupler.is_weight(t) and t.labels is not None]
        for d in range(1, node.outputs[0].ndim + 1):
            dims = [t.labels[-d] for t in sides if t.labels is not None and t.ndim >= d and t.labels[-d] is not None]
            if len(dims) > 1:
                yield from ((own, _WORDS[node.name]) for own in dims)
    elif node.name in _WORDS:
        passed = set() if _WORDS[node.name] == "normalised by" else {id(own) for t in tensors for own in t.labels or ()}
        yield from ((own, _WORDS[node.name]) for own in outputs if id(own) not in passed)


def _of_product(graph: Graph, node: Node, tensors: list[Value], outputs: list[Dim]) -> Iterator[tuple[Dim, str]]:
    weights = [t for t in tensors if graph.coupler.is_weight(t)]
    given = [own for t in tensors if t not in weights for own in t.labels or ()]
    if not weights:
        yield from ((own, "multiplied in") for own in (*given, *outputs))
        return
    if node.name == "convolution" and int(node.args[8]) > 1:
        depthwise = node.args[0].shape[1] == int(node.args[8])
        yield from ((own, f"{'depthwise' if depthwise else 'grouped'} convolution") for own in (*given, *outputs))
        return
    passed = {id(own) for own in given}
    made = {id(own) for own in outputs}
    yield from ((own, "made by") for own in outputs if id(own) not in passed)
    yield from ((own, "read by") for own in given if id(own) not in made)
