"""LayerDrop: blocks left out at random in training, so that any number of them can be taken out afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError, RecipeError, TrainingError, UnknownName
from secateur.graph import passed_on


@contextmanager
def layerdrop(model: nn.Module, blocks: Sequence[str], *, p: float = 0.2) -> Iterator[None]:
    """Within the block, every forward pass in training mode leaves out each of `blocks` with probability `p`.

    A block that is left out hands its first tensor on unchanged, as `secateur.graph.drop_blocks` makes it do for good; the
    names can come from `secateur.graph.removable_blocks`. Draws come from torch's global generator, so a seed fixes them. Under
    activation checkpointing and torch.compile a block may be drawn twice: leave those off here.

    Source: Fan et al. 2020, Reducing Transformer Depth on Demand with Structured Dropout, section 3 (p = 0.2; `every_other`
    is its best choice of what to keep).

    Raises:
        RecipeError: `p` out of [0, 1).
        UnknownName: a block that the model does not have.
        TrainingError: in the forward pass, where a block's output is not of the shape of its input.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> with layerdrop(model, ["0", "1"], p=0.5):
        ...     output = model(torch.ones(2, 4))
    """
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 <= p < 1.0:
        raise RecipeError(f"layerdrop: p is the share of passes in which a block is left out, in [0, 1); got {p!r}")
    modules = dict(model.named_modules())
    if unknown := [name for name in blocks if name not in modules]:
        raise UnknownName("block", unknown[0], modules)
    handles = [modules[name].register_forward_hook(_leave_out(name, p), with_kwargs=True) for name in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def every_other(blocks: Sequence[str], keep: int) -> list[str]:
    """The blocks to take out so that `keep` stay, evenly spread and with the first among them.

    >>> every_other(["a", "b", "c", "d", "e", "f"], 3)
    ['b', 'd', 'f']
    """
    if not 1 <= keep <= len(blocks):
        raise RecipeError(f"layerdrop: {keep} of {len(blocks)} blocks cannot stay: give 1 to {len(blocks)}")
    stay = {index * len(blocks) // keep for index in range(keep)}
    return [name for index, name in enumerate(blocks) if index not in stay]


def _leave_out(name: str, p: float) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not module.training or float(torch.rand(())) >= p:
            return None
        try:
            return passed_on(args, kwargs, output)
        except ModelError as error:
            raise TrainingError(
                f"layerdrop: the output of block {name!r} has not the shape of its input; leave it out"
            ) from error

    return hook
