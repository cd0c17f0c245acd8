"""Patterns without a block structure: single weights of the layer, single weights within each row, whole rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import BoolTensor, Tensor


@dataclass(frozen=True)
class Element:
    """Single weights, all of a layer competing: ``[1, n, 1]``."""

    name: str = "element"
    sparsity: float | None = None
    whole_outputs: bool = False

    def refuses(self, shape: torch.Size) -> str | None:
        """Never: every shape has elements."""
        return None

    def fold(self, weight: Tensor) -> Tensor:
        """``[out, in, *kernel]`` -> ``[1, n, 1]``."""
        return weight.reshape(1, -1, 1)

    def unfold(self, keep: BoolTensor, shape: torch.Size) -> BoolTensor:
        """``[1, n]`` -> `shape`."""
        return keep.reshape(shape)  # type: ignore[return-value]


@dataclass(frozen=True)
class Row:
    """Single weights that compete within their output row only: ``[rows, columns, 1]``."""

    name: str = "row"
    sparsity: float | None = None
    whole_outputs: bool = False

    def refuses(self, shape: torch.Size) -> str | None:
        """Never: every weight has rows."""
        return None

    def fold(self, weight: Tensor) -> Tensor:
        """``[out, in, *kernel]`` -> ``[out, in * kernel, 1]``."""
        return weight.reshape(weight.shape[0], -1, 1)

    def unfold(self, keep: BoolTensor, shape: torch.Size) -> BoolTensor:
        """``[out, in * kernel]`` -> `shape`."""
        return keep.reshape(shape)  # type: ignore[return-value]


@dataclass(frozen=True)
class Neuron:
    """Whole rows: all weights into an output neuron, or a whole filter. ``[1, rows, columns]``."""

    name: str = "neuron"
    sparsity: float | None = None
    whole_outputs: bool = True

    def refuses(self, shape: torch.Size) -> str | None:
        """A layer of one neuron cannot lose a part of its neurons."""
        return f"it has {shape[0]} output neuron, and removing it would empty the layer" if shape[0] < 2 else None

    def fold(self, weight: Tensor) -> Tensor:
        """``[out, in, *kernel]`` -> ``[1, out, in * kernel]``."""
        return weight.reshape(1, weight.shape[0], -1)

    def unfold(self, keep: BoolTensor, shape: torch.Size) -> BoolTensor:
        """``[1, out]`` -> `shape`."""
        return keep.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone()  # type: ignore[return-value]


def element() -> Element:
    """Single weights anywhere in the layer: the finest pattern, the least loss, faster only with a sparse runtime."""
    return Element()


def row() -> Row:
    """Single weights, the same number from every output row, as Wanda compares them."""
    return Row()


def neuron() -> Neuron:
    """Whole output neurons or filters as masks, biases too: the layer keeps its shape. Patterns ``ffn`` and ``channel`` cut."""
    return Neuron()
