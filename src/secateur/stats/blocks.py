"""What layers read, a few of them at a time: block by block where a model repeats one, so that memory stays bounded.

The caller writes the pruned weights of the layers it was given into the model before it asks for more: later layers see
the inputs that the pruned ones produce, and so their choice and repair make up for errors made before.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
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


def inputs_in_turn(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Batches,
    *,
    need: Need = Need.GRAM,
    seed: int = 0,
    done: Collection[str] = (),
    holding: Holding = nullcontext,
    spill_to: Path | None = None,
    notes: list[str] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Gram matrices (or norms, by `need`) of the inputs of all `layers`, each once, in the order the model computes them in.

    A list of blocks of one type (the layers of a transformer) is gone through one block at a time: the arguments of the first
    are recorded, then each block is run twice on them, once watched and once with the weights that the caller pruned. All
    other layers come in passes of the whole model, as many at a time as a tenth of the memory holds the matrices of. Layers
    in `done`, whose weights are final, are left out.

    Memory: one block's matrices and the hidden states of all batches, which go to a file in `spill_to` where they are more
    than a quarter of what is left. Before the first block its time and memory are estimated and said. ``holding(block)`` is
    entered while a block is run, for models whose weights lie on disk. What the report has to say is added to `notes`. Raises
    what `collect` raises.
    """
    turns = _Turns(model, layers, batches, need, seed, done, holding, spill_to, [] if notes is None else notes)
    lists = find_blocks(model, layers)
    inside = {name for blocks in lists for block in blocks for name in within(block, layers)}
    rest = {n: layer for n, layer in layers.items() if n not in inside}
    order = {name: i for i, name in enumerate(layers)}
    for blocks in lists:
        start = min(order[name] for block in blocks for name in within(block, layers))
        early = {n: layer for n, layer in rest.items() if order[n] < start}
        yield from turns.passes(early)
        rest = {n: layer for n, layer in rest.items() if n not in early}
        yield from turns.replayed(blocks)
    yield from turns.passes(rest)


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


@dataclass(frozen=True)
class _Turns:
    """What `inputs_in_turn` was asked for."""

    model: nn.Module
    layers: Mapping[str, Layer]
    batches: Batches
    need: Need
    seed: int
    done: Collection[str]
    holding: Holding
    spill_to: Path | None
    notes: list[str]

    def passes(self, layers: Mapping[str, Layer]) -> Iterator[dict[str, Tensor]]:
        """Passes of the whole model, each for as many layers as memory allows."""
        for part in portions(layers.values(), self._bytes, _MEMORY * total_memory()):
            left = {layer.name: layer for layer in part if layer.name not in self.done}
            if left:
                found = collect(self.model, left, {self.need}, batches=self.batches, seed=self.seed)
                self.notes.extend(note for note in found.notes if note not in self.notes)
                yield {name: stats.need(self.need) for name, stats in found.layers.items()}

    def _bytes(self, layer: Layer) -> float:
        """Of the Gram matrix, or the norms, while they are summed and rounded."""
        width = math.prod(layer.shape[1:])
        return float(getattr(layer.module, "groups", 1)) * width * (width if self.need is Need.GRAM else 1) * 12

    def replayed(self, names: list[str]) -> Iterator[dict[str, Tensor]]:
        """Block by block on recorded arguments; in passes of the whole model where the blocks cannot be run by themselves."""
        model, batches = self.model, self.batches
        blocks = [model.get_submodule(name) for name in names]
        parts = [{n: self.layers[n] for n in within(name, self.layers)} for name in names]
        spill = Spill(folder=self.spill_to)
        with phase(model, self.seed):
            trial = Trial(model, blocks, batches, self.holding)
            calls = [] if trial.reason else record(model, blocks[0], batches, spill, trial.own)
        if trial.reason:
            log.warning("%s to %s are not replayed one by one: %s", names[0], names[-1], trial.reason)
            for part in parts:
                yield from self.passes(part)
            return
        self._announce(trial, len(calls), parts, spill)
        reads = reads_of(model, batches, self.seed)
        for i, (block, part) in enumerate(zip(blocks, parts, strict=True)):
            advance("blocks", i, len(blocks))
            left = {n: layer for n, layer in part.items() if n not in self.done}
            with self.holding(block):
                if left:
                    with phase(model, self.seed):
                        found = watch(model, block, left, calls, batches, self.need, reads, self.notes)
                    yield found
                    del found
                if i + 1 < len(blocks):
                    with phase(model, self.seed):
                        for call in calls:
                            call.proceed(call.run(block))
        advance("blocks", len(blocks), len(blocks))

    def _announce(self, trial: Trial, calls: int, parts: list[dict[str, Layer]], spill: Spill) -> None:
        """Say what is to come, where it takes more than a minute: two runs of every block on every batch."""
        seconds = 2 * trial.seconds * calls
        matrices = max(sum(map(self._bytes, part.values())) for part in parts)
        say = log.warning if seconds > _LONG else log.info
        say(
            "calibrating %d blocks: about %.0f min without the solver; %.1f GB for matrices, %.1f for hidden states, %.1f on "
            "disk",
            *(len(parts), seconds / 60, matrices / 1e9, trial.values * calls * 4 / 1e9, spill.spilled / 1e9),
        )
