"""The repeated blocks of a model, and running them one by one on recorded inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from secateur.data.batches import Batches
from secateur.errors import ModelError
from secateur.layers import find_layers
from secateur.stats import watch
from secateur.stats.blocks import find_blocks
from secateur.stats.replay import Call, Trial, hooked, phase, record
from secateur.stats.spill import Spill


def block_lists(model: nn.Module) -> list[list[str]]:
    """Names of the blocks of each list of them (the layers of a transformer). ModelError for a model without any."""
    found = find_blocks(model, find_layers(model)[0])
    if not found:
        raise ModelError(f"a {type(model).__name__} has no list of repeated blocks, which this method gates")
    return found


def spread(blocks: int, places: int) -> list[int]:
    """Numbers of as many blocks, that cut the list in pieces as equal as can be; the last block never.

    >>> spread(12, 3)
    [2, 5, 8]
    """
    found = {max(1, round(blocks * (i + 1) / (places + 1))) - 1 for i in range(places)}
    return sorted(place for place in found if place < blocks - 1)


def recorded(model: nn.Module, names: Sequence[str], data: Batches) -> list[Call]:
    """The calls of the first of the blocks `names`, one for each batch, to go through the blocks with, inside a `phase`.

    Raises ModelError where the blocks cannot be run by themselves, with the reason.
    """
    blocks = [model.get_submodule(name) for name in names]
    with phase(model, 0):
        trial = Trial(model, blocks, data, nullcontext)
        if trial.reason:
            raise ModelError(f"{names[0]} to {names[-1]} cannot be calibrated one by one: {trial.reason}")
        return record(model, blocks[0], data, Spill(), trial.own)


def run_all(
    block: nn.Module, calls: Sequence[Call], parts: Sequence[nn.Module], see: Callable[[Any, Tensor], None]
) -> list[Tensor]:
    """What `block` gives on all calls. Meanwhile ``see(part, x)`` with the `positions` that each of its `parts` is given."""
    mask: Tensor | None = None

    def look(part: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(part, positions(args[0], mask))

    outputs = []
    with hooked([part.register_forward_pre_hook(look) for part in parts]):
        for call in calls:
            mask = call.mask
            outputs.append(call.run(block))
    return outputs


def positions(x: Tensor, mask: Tensor | None) -> Tensor:
    """``[..., features]`` as ``[n, features]``, padding left out."""
    return watch.Call(None, (), {}, mask).rows(x)
