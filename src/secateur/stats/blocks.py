"""Gram matrices a few layers at a time: block by block where a model repeats one, so that memory stays bounded.

The caller writes the repaired weights of the layers it was given into the model before it asks for more: later layers see
the inputs that the repaired ones produce, and so their repair makes up for errors made before.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.data.batches import Batches, forward, token_mask
from secateur.layers import Layer
from secateur.progress import advance
from secateur.stats import nonfinite
from secateur.stats.collect import collect
from secateur.stats.gram import Grams
from secateur.stats.guard import check_reached, ordinary, untouched
from secateur.types import Need

log = logging.getLogger("secateur")
_SHARE = 0.25  # of the prunable weights that a list of blocks has to hold to be worth replaying
_MEMORY = 0.1  # of the machine's memory that the matrices of one pass may take


def grams_in_turn(
    model: nn.Module, layers: Mapping[str, Layer], batches: Batches, *, seed: int = 0, done: Collection[str] = ()
) -> Iterator[dict[str, Tensor]]:
    """Gram matrices of all `layers`, each of them once, in the order in which the model computes them.

    A list of blocks of one type (the layers of a transformer) is gone through one block at a time: the arguments of the first
    are recorded, then each block is run twice on them, once watched and once with the weights that the caller repaired. All
    other layers come in passes of the whole model, as many at a time as a tenth of the memory holds the matrices of. Of the
    layers in `done`, whose weights are final, no matrices are made.

    Memory: one block's matrices and the hidden states of all batches. Raises what `collect` raises.
    """
    lists = find_blocks(model, layers)
    inside = {name for blocks in lists for block in blocks for name in _within(block, layers)}
    rest = {n: layer for n, layer in layers.items() if n not in inside}
    order = {name: i for i, name in enumerate(layers)}
    for blocks in lists:
        start = min(order[name] for block in blocks for name in _within(block, layers))
        early = {n: layer for n, layer in rest.items() if order[n] < start}
        yield from _passes(model, early, batches, seed, done)
        rest = {n: layer for n, layer in rest.items() if n not in early}
        yield from _replayed(model, layers, blocks, batches, seed, done)
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
        weights = [sum(layers[n].parameter.numel() for n in _within(child, layers)) for child in names]
        if min(weights) > 0 and sum(weights) >= _SHARE * total and len(_within(names[0], layers)) > 1:
            found.append(names)
    return found


def _within(block: str, layers: Mapping[str, Layer]) -> list[str]:
    return [n for n in layers if _below(n, block)]


def _below(name: str, block: str) -> bool:
    return name == block or name.startswith(block + ".")


def _passes(
    model: nn.Module, layers: Mapping[str, Layer], batches: Batches, seed: int, done: Collection[str]
) -> Iterator[dict[str, Tensor]]:
    """Passes of the whole model, each for as many layers as memory allows."""
    for chosen in portions(layers):
        yield from _one_pass(model, chosen, batches, seed, done)


def portions(layers: Mapping[str, Layer]) -> Iterator[dict[str, Layer]]:
    """The layers in order, as many at a time as a tenth of the memory holds the Gram matrices of, and at least one."""
    budget = _MEMORY * memory()
    chosen: dict[str, Layer] = {}
    used = 0.0
    for name, layer in layers.items():
        needed = _bytes(layer)
        if chosen and used + needed > budget:
            yield chosen
            chosen, used = {}, 0.0
        chosen[name] = layer
        used += needed
    if chosen:
        yield chosen


def _one_pass(
    model: nn.Module, layers: dict[str, Layer], batches: Batches, seed: int, done: Collection[str]
) -> Iterator[dict[str, Tensor]]:
    left = {n: layer for n, layer in layers.items() if n not in done}
    if left:
        found = collect(model, left, {Need.GRAM}, batches=batches, seed=seed).layers
        yield {name: stats.need(Need.GRAM) for name, stats in found.items()}


def _bytes(layer: Layer) -> float:
    """Of the Gram matrix while it is summed and rounded."""
    return float(getattr(layer.module, "groups", 1)) * math.prod(layer.shape[1:]) ** 2 * 12


def memory() -> int:
    """Bytes of memory of this machine; 8 GiB where it does not say."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 << 30


class _Stop(Exception):
    """Ends a forward pass at the first block: what comes after is not needed."""


class _Call:
    """The arguments of the first block on one batch, and the padding mask that goes with them."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None):
        self.args, self.kwargs, self.mask = args, kwargs, mask

    @property
    def hidden(self) -> Tensor:
        """What a block hands on to the next: its first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    def run(self, block: nn.Module) -> Tensor:
        """The hidden state after `block`."""
        output = block(*self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def proceed(self, hidden: Tensor) -> None:
        """Put the hidden state after a block in the place of the one before it."""
        if self.args:
            self.args = (hidden, *self.args[1:])
        else:
            self.kwargs[next(iter(self.kwargs))] = hidden


def _replayed(
    model: nn.Module, layers: Mapping[str, Layer], names: list[str], batches: Batches, seed: int, done: Collection[str]
) -> Iterator[dict[str, Tensor]]:
    """Block by block on recorded arguments; in passes of the whole model where the blocks cannot be run by themselves."""
    blocks = [model.get_submodule(name) for name in names]
    parts = [{n: layers[n] for n in _within(name, layers)} for name in names]
    with _phase(model, seed):
        reason = _why_not(model, blocks, batches)
        calls = [] if reason else _record(model, blocks[0], batches)
    if reason:
        log.warning("%s to %s are not replayed one by one: %s", names[0], names[-1], reason)
        for part in parts:
            yield from _passes(model, part, batches, seed, done)
        return
    for i, (block, part) in enumerate(zip(blocks, parts, strict=True)):
        advance("blocks", i, len(blocks))
        left = {n: layer for n, layer in part.items() if n not in done}
        if left:
            with _phase(model, seed):
                grams = _watch(model, block, left, calls, batches)
            yield grams
            del grams
        if i + 1 < len(blocks):
            with _phase(model, seed):
                for call in calls:
                    call.proceed(call.run(block))
    advance("blocks", len(blocks), len(blocks))


def _watch(
    model: nn.Module, block: nn.Module, layers: Mapping[str, Layer], calls: list[_Call], batches: Batches
) -> dict[str, Tensor]:
    watcher = Grams(model, layers)
    for index, call in enumerate(calls):
        with watcher.recording({} if call.mask is None else {"attention_mask": call.mask}):
            call.run(block)
        if not watcher.finite():
            batch = next(b for i, b in enumerate(batches) if i == index)
            nonfinite.explain(model, lambda batch=batch: forward(model, batch), index)  # type: ignore[misc]
    check_reached([name for name in layers if name not in watcher.seen], "no call was seen of the modules of")
    return watcher.take()


@contextmanager
def _phase(model: nn.Module, seed: int) -> Iterator[None]:
    """Eval mode and no gradients, and no key-value cache, into which every replay would write again."""
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    with untouched(model, [], seed), torch.no_grad():
        try:
            if cache is not None:
                config.use_cache = False  # type: ignore[union-attr]
            yield
        finally:
            if cache is not None:
                config.use_cache = cache  # type: ignore[union-attr]


def _record(model: nn.Module, block: nn.Module, batches: Batches) -> list[_Call]:
    """Arguments of `block` for every batch; the forward pass goes no further."""
    calls: list[_Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_Call(args, dict(kwargs), mask))
        raise _Stop

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for batch in batches:
            mask = token_mask(batch)
            try:
                forward(model, ordinary(batch))
            except _Stop:
                continue
    finally:
        handle.remove()
    return calls


def _why_not(model: nn.Module, blocks: list[nn.Module], batches: Batches) -> str | None:
    """Why the blocks cannot be run by themselves, tried on the first batch; None where they can.

    Each must be called once, in order, with what the one before gave and otherwise the arguments of the first.
    """
    seen: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []

    def hook(index: int) -> Any:
        return lambda module, args, kwargs: seen.append((index, args, dict(kwargs)))

    handles = [b.register_forward_pre_hook(hook(i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        forward(model, ordinary(next(iter(batches))))
    finally:
        for handle in handles:
            handle.remove()
    if [index for index, _, _ in seen] != list(range(len(blocks))):
        return "they are not called once each, in order"
    first = _Call(seen[0][1], seen[0][2], None)
    if not (first.args or first.kwargs) or not isinstance(first.hidden, Tensor):
        return "their first argument is no tensor"
    if any(type(leaf).__name__.endswith("Cache") for leaf in pytree.tree_leaves((first.args, first.kwargs))):
        return "they are given a key-value cache"
    for index, args, kwargs in seen[1:]:
        first.proceed(first.run(blocks[index - 1]))
        if not _alike((args, kwargs), (first.args, first.kwargs)):
            return f"the {index + 1}th gets other arguments than what the one before gave and the first was given"
    return None


def _alike(one: Any, other: Any) -> bool:
    a, spec_a = pytree.tree_flatten(one)
    b, spec_b = pytree.tree_flatten(other)
    return spec_a == spec_b and all(_same(x, y) for x, y in zip(a, b, strict=True))


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x is y or (x.shape == y.shape and x.dtype == y.dtype and torch.allclose(x, y, rtol=1e-4, atol=1e-5))
    return x is y or bool(x == y)
