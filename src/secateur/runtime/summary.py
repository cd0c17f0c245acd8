"""What deploy() decided, layer by layer, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerChoice:
    """One layer of a deployed model."""

    name: str
    shape: tuple[int, ...]  #: of the weight
    input_shape: tuple[int, ...] | None  #: of the example's activations; None where the layer was not called
    sparsity: float
    runtime: str  #: ``"dense"`` or a name of the registry
    dense_ms: float | None = None
    sparse_ms: Mapping[str, float] = field(default_factory=dict)  #: of every runtime that was tried
    reason: str = ""  #: why it stays dense
    fused: str = ""  #: name of the activation module that went into it

    @property
    def speedup(self) -> float:
        """Dense time over chosen time; 1 for a layer that stays dense."""
        return self.dense_ms / self.sparse_ms[self.runtime] if self.dense_ms and self.runtime != "dense" else 1.0


@dataclass(frozen=True)
class Summary:
    """The whole model: medians of one forward pass of the example, dense and deployed, measured in turns.

    On one thread of a CPU all times are the processor's, on more the clock's.
    """

    layers: tuple[LayerChoice, ...]
    dense_ms: float
    deployed_ms: float
    speedup: float  #: median of the ratios of each round
    error: float  #: largest difference of outputs over the largest output
    threads: int
    folded: tuple[tuple[str, str], ...] = ()  #: (layer, the BatchNorm that went into it)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """The table of layers, and the line that counts."""
        head = ("layer", "weight", "input", "sparsity", "runtime", "dense ms", "sparse ms", "")
        rows = [head, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(
            f"whole model: {self.dense_ms:.3f} ms dense, {self.deployed_ms:.3f} ms deployed, {self.speedup:.2f}x "
            f"on {self.threads} threads; outputs differ by {self.error:.1e}; {len(self.folded)} BatchNorms folded"
        )
        return "\n".join([*lines, *self.notes])


def _row(layer: LayerChoice) -> tuple[str, ...]:
    best = min(layer.sparse_ms.values(), default=None)
    return (
        layer.name,
        "x".join(map(str, layer.shape)),
        "x".join(map(str, layer.input_shape or ())),
        f"{layer.sparsity:.1%}",
        layer.runtime,
        "" if layer.dense_ms is None else f"{layer.dense_ms:.3f}",
        "" if best is None else f"{best:.3f}",
        layer.reason or (f"with {layer.fused}" if layer.fused else ""),
    )
