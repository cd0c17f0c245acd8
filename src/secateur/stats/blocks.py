"""Gram matrices a few layers at a time: block by block where a model repeats one, so that memory stays bounded.

The caller writes the repaired weights of the layers it was given into the model before it asks for more: later layers see
the inputs that the repaired ones produce, and so their repair makes up for errors made before.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor, nn

from secateur.data.batches import Batches
from secateur.layers import Layer
from secateur.memory import portions, total_memory
from secateur.progress import advance
from secateur.stats.collect import collect
from secateur.stats.reads import reads_of
from secateur.stats.replay import Holding, Trial, phase, record, watch
from secateur.stats.spill import Spill
from secateur.types import Need

log = logging.getLogger("secateur")
_SHARE = 0.25  # of the prunable weights that a list of blocks has to hold to be worth replaying
_LONG = 60.0  # seconds from which on a run is announced as a warning
_MEMORY = 0.1  # of the machine's memory that the matrices of one pass may take


def grams_in_turn(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Batches,
    *,
    seed: int = 0,
    done: Collection[str] = (),
    holding: Holding = nullcontext,
    spill_to: Path | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Gram matrices of all `layers`, each of them once, in the order in which the model computes them.

    A list of blocks of one type (the layers of a transformer) is gone through one block at a time: the arguments of the first
    are recorded, then each block is run twice on them, once watched and once with the weights that the caller repaired. All
    other layers come in passes of the whole model, as many at a time as a tenth of the memory holds the matrices of. Of the
    layers in `done`, whose weights are final, no matrices are made.

    Memory: one block's matrices and the hidden states of all batches, which go to a file in `spill_to` where they are more
    than a quarter of what is left. Before the first block its time and memory are estimated and said. ``holding(block)`` is
    entered while a block is run, for models whose weights lie on disk. Raises what `collect` raises.
    """
    lists = find_blocks(model, layers)
    inside = {name for blocks in lists for block in blocks for name in within(block, layers)}
    rest = {n: layer for n, layer in layers.items() if n not in inside}
    order = {name: i for i, name in enumerate(layers)}
    for blocks in lists:
        start = min(order[name] for block in blocks for name in within(block, layers))
        early = {n: layer for n, layer in rest.items() if order[n] < start}
        yield from _passes(model, early, batches, seed, done)
        rest = {n: layer for n, layer in rest.items() if n not in early}
        yield from _replayed(model, layers, blocks, batches, seed, done, holding, spill_to)
    yield from _passes(model, rest, batches, seed, done)


def find_blocks(model: nn.Module, layers: Mapping[str, Layer]) -> list[list[str]]:
    """Names of the modules that repeat: children of one type of a list that hold a quarter of the prunable weights or more.

    Example:
        >>> from secateur.layers import find_layers
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*[nn.TransformerEncoderLayer(4, 1) for _ in range(2)]))
        >>> find_blocks(model, find_layers(model)[0])
        [['1.0', '1.1']]
    """
    total = sum(layer.parameter.numel() for layer in layers.values())
    found: list[list[str]] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(_below(name, b) for blocks in found for b in blocks):
            continue
        children = [(f"{name}.{child}" if name else child, m) for child, m in module.named_children()]
        if len(children) < 2 or len({type(m) for _, m in children}) > 1:
            continue
        names = [child for child, _ in children]
        weights = [sum(layers[n].parameter.numel() for n in within(child, layers)) for child in names]
        if min(weights) > 0 and sum(weights) >= _SHARE * total and len(within(names[0], layers)) > 1:
            found.append(names)
    return found


def within(block: str, layers: Mapping[str, Layer]) -> list[str]:
    """Names of the layers inside the module `block`."""
    return [n for n in layers if _below(n, block)]


def _below(name: str, block: str) -> bool:
    return name == block or name.startswith(block + ".")


def _passes(
    model: nn.Module, layers: Mapping[str, Layer], batches: Batches, seed: int, done: Collection[str]
) -> Iterator[dict[str, Tensor]]:
    """Passes of the whole model, each for as many layers as memory allows."""
    for part in portions(layers.values(), _bytes, _MEMORY * total_memory()):
        left = {layer.name: layer for layer in part if layer.name not in done}
        if left:
            found = collect(model, left, {Need.GRAM}, batches=batches, seed=seed).layers
            yield {name: stats.need(Need.GRAM) for name, stats in found.items()}


def _bytes(layer: Layer) -> float:
    """Of the Gram matrix while it is summed and rounded."""
    return float(getattr(layer.module, "groups", 1)) * math.prod(layer.shape[1:]) ** 2 * 12


def _replayed(
    model: nn.Module,
    layers: Mapping[str, Layer],
    names: list[str],
    batches: Batches,
    seed: int,
    done: Collection[str],
    holding: Holding,
    spill_to: Path | None,
) -> Iterator[dict[str, Tensor]]:
    """Block by block on recorded arguments; in passes of the whole model where the blocks cannot be run by themselves."""
    blocks = [model.get_submodule(name) for name in names]
    parts = [{n: layers[n] for n in within(name, layers)} for name in names]
    spill = Spill(folder=spill_to)
    with phase(model, seed):
        trial = Trial(model, blocks, batches, holding)
        calls = [] if trial.reason else record(model, blocks[0], batches, spill, trial.own)
    if trial.reason:
        log.warning("%s to %s are not replayed one by one: %s", names[0], names[-1], trial.reason)
        for part in parts:
            yield from _passes(model, part, batches, seed, done)
        return
    _announce(trial, len(calls), parts, spill)
    reads = reads_of(model, batches, seed)
    for i, (block, part) in enumerate(zip(blocks, parts, strict=True)):
        advance("blocks", i, len(blocks))
        left = {n: layer for n, layer in part.items() if n not in done}
        with holding(block):
            if left:
                with phase(model, seed):
                    grams = watch(model, block, left, calls, batches, reads)
                yield grams
                del grams
            if i + 1 < len(blocks):
                with phase(model, seed):
                    for call in calls:
                        call.proceed(call.run(block))
    advance("blocks", len(blocks), len(blocks))


def _announce(trial: Trial, calls: int, parts: list[dict[str, Layer]], spill: Spill) -> None:
    """Say what is to come, where it takes more than a minute: two runs of every block on every batch."""
    seconds = 2 * trial.seconds * calls
    matrices = max(sum(map(_bytes, part.values())) for part in parts)
    say = log.warning if seconds > _LONG else log.info
    say(
        "calibrating %d blocks: about %.0f min without the solver; %.1f GB for matrices, %.1f for hidden states, %.1f on disk",
        *(len(parts), seconds / 60, matrices / 1e9, trial.values * calls * 4 / 1e9, spill.spilled / 1e9),
    )
