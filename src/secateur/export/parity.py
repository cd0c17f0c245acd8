"""Whether an exported model computes what the model does: other batches than the one it was traced with, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.data.batches import Batch, inputs_of
from secateur.errors import ExportError
from secateur.measure.modes import evaluating

BATCHES = (1, 2, 7)  #: sizes at which every export is compared
#: From positional and keyword arguments to the tensors that come out.
Runner = Callable[[tuple[Any, ...], dict[str, Any]], Sequence[Tensor]]


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference of any output, relative to the largest value of that output."""

    batch: int
    error: float


@dataclass(frozen=True)
class Example:
    """The arguments a model is called with, and the same in other batch sizes. Labels are no inputs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, batch: Batch) -> Example:
        """Raises ExportError where there is no tensor with a batch dimension."""
        args, kwargs = inputs_of(batch)
        example = cls(tuple(args), {k: v for k, v in kwargs.items() if k not in ("labels", "label")})
        if not example.tensors or any(t.dim() == 0 or len(t) != len(example.tensors[0]) for t in example.tensors):
            raise ExportError("the example needs input tensors with one batch dimension in front, the same for all")
        return example

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return tensors_in((self.args, self.kwargs))

    def resized(self, batch: int) -> Example:
        """The same samples over and over, so that there are `batch`; no two floating-point ones are equal."""

        def resize(tensor: Tensor) -> Tensor:
            rows = tensor[torch.arange(batch) % len(tensor)]
            if not tensor.is_floating_point():
                return rows
            generator = torch.Generator().manual_seed(batch)
            noise = torch.randn(rows.shape, generator=generator).to(rows.dtype)
            return rows + 0.1 * noise * rows.abs().mean().clamp(min=1e-3)

        return Example(*pytree.tree_map_only(Tensor, resize, (self.args, self.kwargs)))


@torch.no_grad()
def run_model(model: nn.Module, example: Example) -> list[Tensor]:
    """The tensors that `model` puts out, in evaluation mode."""
    with evaluating(model):
        return tensors_in(model(*example.args, **example.kwargs))


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among the leaves of nested containers, in their order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def compare(model: nn.Module, runner: Runner, example: Example, *, tolerance: float, what: str) -> tuple[Check, ...]:
    """Run both at each of `BATCHES`. Raises ExportError where the outputs differ by more than `tolerance`, relative."""
    checks = []
    for batch in BATCHES:
        inputs = example.resized(batch)
        expected, got = run_model(model, inputs), list(runner(inputs.args, inputs.kwargs))
        check = Check(batch, _difference(expected, got, what))
        if not check.error <= tolerance:
            raise ExportError(
                f"the exported {what} computes something else than the model: at batch {batch} outputs differ by "
                f"{check.error:.1e}, relative; {tolerance:.0e} is allowed. Nothing was written."
            )
        checks.append(check)
    return tuple(checks)


def _difference(expected: Sequence[Tensor], got: Sequence[Tensor], what: str) -> float:
    if len(expected) != len(got) or any(a.shape != b.shape for a, b in zip(expected, got, strict=True)):
        shapes = [[list(t.shape) for t in side] for side in (expected, got)]
        raise ExportError(f"the exported {what} puts out {shapes[1]}, the model {shapes[0]}")
    worst = 0.0
    for one, other in zip(expected, got, strict=True):
        size = float(one.detach().double().abs().max()) if one.numel() else 0.0
        change = float((one.detach().double() - other.detach().double()).abs().max()) if one.numel() else 0.0
        worst = max(worst, change / size if size else change) if change == change else float("nan")
    return worst
