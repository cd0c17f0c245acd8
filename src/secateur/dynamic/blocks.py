"""The repeated blocks of a model, and running them one by one on recorded inputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from torch import nn

from secateur.data.batches import Batches
from secateur.errors import ModelError
from secateur.layers import find_layers
from secateur.stats.blocks import find_blocks
from secateur.stats.replay import Call, Trial, phase, record
from secateur.stats.spill import Spill


def block_lists(model: nn.Module) -> list[list[str]]:
    """Names of the blocks of each list of them (the layers of a transformer). ModelError for a model without any."""
    found = find_blocks(model, find_layers(model)[0])
    if not found:
        raise ModelError(f"a {type(model).__name__} has no list of repeated blocks, which this method gates")
    return found


def recorded(model: nn.Module, names: Sequence[str], data: Batches) -> list[Call]:
    """The calls of the first of the blocks `names`, one for each batch, to go through the blocks with, inside a `phase`.

    Raises ModelError where the blocks cannot be run by themselves, with the reason.
    """
    blocks = [model.get_submodule(name) for name in names]
    with phase(model, 0):
        if reason := Trial(model, blocks, data, nullcontext).reason:
            raise ModelError(f"{names[0]} to {names[-1]} cannot be calibrated one by one: {reason}")
        return record(model, blocks[0], data, Spill())
