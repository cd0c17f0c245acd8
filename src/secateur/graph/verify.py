"""Verify: the cut model against the original with the removed channels masked, operation by operation.

The original is run on real tensors. After every operation whatever the plan removes is set to zero, so that no consumer sees
it; statistics over a cut dimension are taken over what is kept. The result must be what the cut model gives.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import ModelError
from secateur.graph.graph import Graph
from secateur.graph.trace import Node, Value, arguments, tensors_in, untouched

#: A cut model's output may differ from the masked original's by this much, relative to its largest value.
TOLERANCE = 1e-4

_STATISTICS = frozenset({
    "native_batch_norm", "_native_batch_norm_legit", "native_layer_norm", "_fused_rms_norm", "native_group_norm", "mean", "var",
    "std", "var_mean", "std_mean", "norm", "linalg_vector_norm",
})  # fmt: skip


class Replay:
    """Runs the recorded operations on real tensors as if the removed indices were not there."""

    def __init__(self, graph: Graph, removed: NDArray[np.bool_]):
        self.graph, self.removed = graph, removed
        self._masks: dict[int, Tensor | None] = {}

    def run(self, known: dict[Value, Tensor]) -> list[Tensor]:
        """The outputs, given the tensors of parameters, buffers and inputs."""
        recording = self.graph.recording
        last = {v: i for i, node in enumerate(recording.nodes) for v in node.tensors}
        keep = set(recording.outputs)
        for i, node in enumerate(recording.nodes):
            self._step(node, known)
            for value in {*node.tensors, *node.outputs}:
                if last.get(value, i) <= i and value not in keep:
                    known.pop(value, None)
        return [self._tensor(v, known) for v in recording.outputs]

    def _tensor(self, value: Value, known: dict[Value, Tensor]) -> Tensor:
        return known[value] if value.constant is None else value.constant

    def _step(self, node: Node, known: dict[Value, Tensor]) -> None:
        args, kwargs = (pytree.tree_map_only(Value, lambda v: self._tensor(v, known), x) for x in (node.args, node.kwargs))
        cut_inputs = node.name in _STATISTICS and any(self.masks(v) for v in _values(node.args))
        # strides may differ from the recorded run's, so that what was a view there has to be a copy here
        op = torch.ops.aten.reshape.default if node.op is torch.ops.aten.view.default else node.op
        out = self._on_kept(node, args, kwargs) if cut_inputs else op(*args, **kwargs)
        tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) or (t is None and len(node.outputs) > 1)]
        for tensor, value in zip(tensors, node.outputs, strict=True):
            if tensor is None:  # a workspace that real kernels leave out
                continue
            known[value] = tensor
            if not node.op.is_view:
                for dim, mask in self.masks(value):
                    tensor.masked_fill_(~_along(mask, dim, tensor.ndim), 0)

    def masks(self, value: Value) -> list[tuple[int, Tensor]]:
        """Dimensions of which something goes, and what is kept of them."""
        found = []
        for d, own in enumerate(value.labels or []):
            if own is None:
                continue
            if id(own) not in self._masks:
                kept = self.graph.mask(own, self.removed)
                self._masks[id(own)] = None if kept.all() else torch.from_numpy(kept)
            mask = self._masks[id(own)]
            if mask is not None:
                found.append((d, mask))
        return found

    def _on_kept(self, node: Node, args: Any, kwargs: Any) -> Any:
        """Run the operation on what is kept, and lay its results where they belong."""

        def gather(value: Any, given: Any) -> Any:
            if not isinstance(value, Value):
                return given
            for d, mask in self.masks(value):
                given = given.index_select(d, mask.nonzero().flatten())
            return given

        small = [gather(v, g) for v, g in zip(node.args, args, strict=True)]
        if node.name in ("native_layer_norm", "_fused_rms_norm"):
            small[1] = list(small[0].shape[small[0].ndim - len(args[1]) :])
        if node.name == "native_group_norm":
            mask = dict(self.masks(node.args[0]))[1]
            groups = int(mask.reshape(args[6], -1).any(1).sum())
            small[3:7] = [small[0].shape[0], small[0].shape[1], int(np.prod(small[0].shape[2:])), groups]
        results = node.op(*small, **kwargs)
        full = []
        for value, result in zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=True):
            whole = result
            for d, mask in self.masks(value):
                shape = list(whole.shape)
                shape[d] = len(mask)
                whole = whole.new_zeros(shape).index_copy_(d, mask.nonzero().flatten(), whole)
            full.append(whole)
        return tuple(full) if isinstance(results, tuple) else full[0]


def _values(tree: Any) -> list[Value]:
    return [v for v in pytree.tree_leaves(tree) if isinstance(v, Value)]


def _along(mask: Tensor, dim: int, ndim: int) -> Tensor:
    return mask.reshape([-1 if d == dim else 1 for d in range(ndim)])


@torch.no_grad()
def masked_output(model: nn.Module, graph: Graph, removed: NDArray[np.bool_], example: Any) -> list[Tensor]:
    """All output tensors of `model` with what goes masked, and of outputs that are cut themselves only what is kept.

    `example` must have the shapes of the one that was traced.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    known = {value: tensors[name].detach().clone() for name, value in graph.recording.values.items()}
    given = [t.detach().clone() for t in pytree.tree_leaves(arguments(example)) if isinstance(t, Tensor)]
    known.update(zip(graph.recording.inputs, given, strict=True))
    replay = Replay(graph, removed)
    for value, tensor in known.items():
        for dim, mask in replay.masks(value):
            tensor.masked_fill_(~_along(mask, dim, tensor.ndim), 0)
    outputs = replay.run(known)
    for i, value in enumerate(graph.recording.outputs):
        for dim, mask in replay.masks(value):
            outputs[i] = outputs[i].index_select(dim, mask.nonzero().flatten())
    return outputs


@torch.no_grad()
def difference(model: nn.Module, smaller: nn.Module, graph: Graph, removed: NDArray[np.bool_], example: Any) -> float:
    """Largest difference of the cut model's outputs from the masked original's, relative to the largest of each output.

    Raises ModelError where the cut model fails on the example or an output changes its shape.
    """
    args, kwargs = arguments(example)
    try:
        with untouched(smaller), _same_draws(example):
            found = tensors_in(smaller(*args, **kwargs))
    except Exception as error:
        raise ModelError(
            f"the cut model fails on the example: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    with _same_draws(example):
        wanted = masked_output(model, graph, removed, example)
    if [t.shape for t in found] != [t.shape for t in wanted]:
        raise ModelError(
            f"the cut changed the output's shape from {[tuple(t.shape) for t in wanted]} to {[tuple(t.shape) for t in found]}"
        )
    difference = worst(found, wanted)
    if graph.recording.replaced:  # what was traced has to be what the model does
        with untouched(model), _same_draws(example):
            own = tensors_in(model(*args, **kwargs))
        difference = max(difference, worst(masked_output(model, graph, np.zeros_like(removed), example), own))
    return difference


@contextlib.contextmanager
def _same_draws(example: Any) -> Iterator[None]:
    """A forward that draws numbers draws the same ones each time, inside; the generators are left as they were."""
    devices = {t.device for t in pytree.tree_leaves(arguments(example)) if isinstance(t, Tensor) and t.is_cuda}
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference of outputs, by the largest finite value of each; infinite where one alone is NaN or infinite."""
    error = 0.0
    for a, b in zip(found, wanted, strict=True):
        if a.numel() and (a.is_floating_point() or a.is_complex()):
            same = (a == b) | (a.isnan() & b.isnan())
            gap = float((a - b).abs().masked_fill(same, 0).max())
            scale = float(b.abs().masked_fill(~b.isfinite(), 0).max())
            error = max(error, math.inf if math.isnan(gap) else gap / (scale or 1.0))
    return error
