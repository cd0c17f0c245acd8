"""Running repeated blocks by themselves on recorded arguments: recording, checking that it can be done, watching."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.data.batches import Batches, forward, token_mask
from secateur.layers import Layer
from secateur.stats import nonfinite
from secateur.stats.gram import Grams
from secateur.stats.guard import check_reached, ordinary, untouched
from secateur.stats.inputs import InputNorms
from secateur.stats.notes import say, unmasked_notes, zero_notes
from secateur.stats.reads import Reads
from secateur.stats.spill import Slot, Spill
from secateur.types import Need

#: Makes a module's weights present for a while: for models whose weights are on disk.
Holding = Callable[[nn.Module], AbstractContextManager[Any]]


class _Stop(Exception):
    """Ends a forward pass where what comes after is not needed."""


#: For each block, the leaves of its arguments that are constants of its own (its number, a rate), by their place.
Own = Sequence[Mapping[int, Any]]


class Call:
    """The arguments of the first block on one batch, the padding mask that goes with them, and the hidden state in hand."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None, spill: Spill, own: Own):
        self._own, self._turn = own, 0
        self._first = next(iter(kwargs)) if not args else None
        self._hidden: Tensor | Slot = spill.keep(args[0] if args else kwargs[self._first])  # type: ignore[index]
        self._args, self._spill, self.mask = args[1:], spill, mask
        self._kwargs = {k: v for k, v in kwargs.items() if k != self._first}

    @property
    def hidden(self) -> Tensor:
        """The hidden state in hand, the first argument of the block in turn."""
        return self._spill.get(self._hidden)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the block in turn is called with."""
        given: Any = ((self.hidden, *self._args), self._kwargs)
        if self._first is not None:
            given = ((), {self._first: self.hidden, **self._kwargs})
        if not self._own[self._turn]:
            return given
        leaves, spec = pytree.tree_flatten(given)
        return pytree.tree_unflatten([self._own[self._turn].get(i, leaf) for i, leaf in enumerate(leaves)], spec)

    def run(self, block: nn.Module) -> Tensor:
        """The hidden state after `block`."""
        args, kwargs = self.arguments()
        return hidden_of(block(*args, **kwargs))

    def proceed(self, hidden: Tensor) -> None:
        """Put the hidden state after a block in the place of the one before it: the next block's turn."""
        self._hidden = self._spill.keep(hidden, self._hidden)
        self._turn = min(self._turn + 1, len(self._own) - 1)


def hidden_of(output: Any) -> Tensor:
    """What a block hands on to the next: its output, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def phase(model: nn.Module, seed: int) -> Iterator[None]:
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


def record(model: nn.Module, block: nn.Module, batches: Batches, spill: Spill, own: Own) -> list[Call]:
    """Arguments of the first `block` for every batch, the forward pass goes no further; the others' constants are `own`."""
    calls: list[Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, dict(kwargs), mask, spill, own))
        raise _Stop

    with hooked([block.register_forward_pre_hook(hook, with_kwargs=True)]):
        for batch in batches:
            mask = token_mask(batch)
            try:
                forward(model, ordinary(batch))
            except _Stop:
                continue
    return calls


def watch(
    model: nn.Module,
    block: nn.Module,
    layers: Mapping[str, Layer],
    calls: list[Call],
    batches: Batches,
    need: Need,
    reads: Reads | None,
    notes: list[str],
) -> dict[str, Tensor]:
    """Gram matrices or norms of the inputs of `layers`, all of them within `block`, on the calls; nothing is handed on.

    What the report has to say is added to `notes`, and logged.
    """
    watcher: Grams | InputNorms = (Grams if need is Need.GRAM else InputNorms)(model, layers, reads)
    for index, call in enumerate(calls):
        with watcher.recording({} if call.mask is None else {"attention_mask": call.mask}):
            call.run(block)
        if not watcher.finite():
            batch = next(b for i, b in enumerate(batches) if i == index)
            nonfinite.explain(model, lambda batch=batch: forward(model, batch), index)  # type: ignore[misc]
    check_reached([name for name in layers if name not in watcher.seen], "no call was seen of the modules of")
    found = watcher.take()
    say((*zero_notes(need, found), *unmasked_notes(watcher.unmasked)), notes)
    return found


class Trial:
    """The blocks tried by themselves on the first batch: why they cannot be run so, None where they can, and the seconds.

    Each must be called once, in order, with what the one before gave and otherwise the arguments of the first, but for
    constants of its `own`; and what the last one gives by itself must be what it gave in the model. This is the self-check of
    the dense model before pruning.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], batches: Batches, holding: Holding):
        self._blocks, self._holding = blocks, holding
        self._seen: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []
        self._given: Tensor | None = None
        self.seconds = 0.0  #: that one batch takes in all blocks
        self.values = 0  #: in the hidden state of one batch
        self.own: list[dict[int, Any]] = []  #: see `Own`
        handles = [b.register_forward_pre_hook(self._look(i), with_kwargs=True) for i, b in enumerate(blocks)]
        handles.append(blocks[-1].register_forward_hook(self._look_at_the_last))
        with hooked(handles):
            forward(model, ordinary(next(iter(batches))))
        self.reason = self._why_not()

    def _look(self, index: int) -> Any:
        return lambda module, args, kwargs: self._seen.append((index, args, dict(kwargs)))

    def _look_at_the_last(self, module: nn.Module, args: Any, output: Any) -> None:
        self._given = output if isinstance(output, Tensor) else output[0]

    def _why_not(self) -> str | None:
        if [index for index, _, _ in self._seen] != list(range(len(self._blocks))):
            return "they are not called once each, in order"
        _, args, kwargs = self._seen[0]
        if not (args or kwargs) or not isinstance(args[0] if args else next(iter(kwargs.values())), Tensor):
            return "their first argument is no tensor"
        if any(type(leaf).__name__.endswith("Cache") for leaf in pytree.tree_leaves((args, kwargs))):
            return "they are given a key-value cache"
        self.own = [_constants(given, (args, kwargs)) for _, *given in self._seen]
        first = Call(args, kwargs, None, Spill(), self.own)
        started = time.perf_counter()
        for index, block in enumerate(self._blocks):
            if index and not _alike(self._seen[index][1:], first.arguments()):
                return f"the {index + 1}th gets other arguments than what the one before gave and the first was given"
            with self._holding(block):
                first.proceed(hidden := first.run(block))
        self.seconds, self.values = time.perf_counter() - started, hidden.numel()
        return None if _same(self._given, hidden) else "the last gives something else by itself than in the model"


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Takes the hooks of these handles away afterwards."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _constants(given: Any, first: Any) -> dict[int, Any]:
    """What is no tensor in a block's arguments and differs from the first block's, by its place among the leaves."""
    a, b = (pytree.tree_leaves(arguments) for arguments in (tuple(given), first))
    pairs = enumerate(zip(a, b, strict=False))
    return {i: x for i, (x, y) in pairs if not isinstance(x, Tensor) and not isinstance(y, Tensor) and not _same(x, y)}


def _alike(one: Any, other: Any) -> bool:
    a, spec_a = pytree.tree_flatten(one)
    b, spec_b = pytree.tree_flatten(other)
    return spec_a == spec_b and all(_same(x, y) for x, y in zip(a, b, strict=True))


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x is y or (x.shape == y.shape and x.dtype == y.dtype and torch.allclose(x, y, rtol=1e-4, atol=1e-5))
    return x is y or bool(x == y)
