"""Late layers without visual tokens: where text has stopped looking at the image, the image need not be computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.data.batches import inputs_of
from secateur.errors import DataError, ModelError, UnknownName
from secateur.vision_language.attention import Visual, visual_positions


def skip_visual_tokens(model: nn.Module, first: str, *, visual: Visual | None = None) -> SkippedTokens:
    """From the block `first` on, compute the text positions of a language model alone; `model` is changed until `remove`.

    `first` is a member of a module list, or a module within one, such as what `AttentionProfile.quiet_from` returns. Visual
    positions leave the row before it and come back behind the last block as they left, so that the output has its shape. What
    the text positions give is exactly what they would if they paid no attention to visual positions from `first` on:
    skipping visual attention and skipping visual tokens are one thing there, and this is the cheap way to do it.

    The choice is static: made before, the same for every input. Generation works: the key-value caches of the late blocks hold
    text only. All samples of a batch must have the same number of visual positions. Hooks do the work and are not saved: apply
    it again after loading. By default the visual positions are those of the model's image token.

    Raises UnknownName for a block that is not there, ModelError where it is in no module list.

    Example::

        with skip_visual_tokens(llava, "model.language_model.layers.12"):
            llava.generate(**inputs)
    """
    return SkippedTokens(model, first, visual)


class SkippedTokens:
    """The hooks of `skip_visual_tokens`. A context manager; `remove` ends it."""

    def __init__(self, model: nn.Module, first: str, visual: Visual | None):
        owner, index = _place(model, first)
        blocks = list(model.get_submodule(owner).children())
        self._model, self._visual, self._first = model, visual, first
        self._kept: Tensor | None = None  # [samples, kept] positions of the row that are no visual ones
        self._row = 0  # positions of the row that the caches of earlier blocks began with
        self._away: Tensor | None = None
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            blocks[index].register_forward_pre_hook(self._leave, with_kwargs=True),
            *(block.register_forward_pre_hook(self._narrow, with_kwargs=True) for block in blocks[index + 1 :]),
            blocks[-1].register_forward_hook(self._come_back),
        ]

    def remove(self) -> None:
        """Take the hooks off: the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> SkippedTokens:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the visual positions of a new row; a step of generation, which has none, goes on with the last."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] == 1 and kwargs.get("past_key_values") is not None:
            return
        batch = kwargs if kwargs else args
        found = (
            visual_positions(self._model, _named(batch, ids), None) if self._visual is None else self._visual(batch)
        ).bool()
        counts = found.sum(1)
        if int(counts.min()) != int(counts.max()):
            numbers = f"{int(counts.min())} to {int(counts.max())}"
            raise DataError(f"the samples of a batch have {numbers} visual positions: batch samples of one number")
        self._kept = (~found).nonzero()[:, 1].reshape(len(found), -1)
        self._row = found.shape[1]

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Keep the whole row aside and go on with the text positions."""
        hidden = args[0] if args else next(iter(kwargs.values()))
        self._away = hidden if self._kept is not None and hidden.shape[1] == self._row else None
        args, kwargs = self._narrow(module, args, kwargs)
        if self._away is not None:  # the hidden state is the first argument: of the row it was not cut with the masks
            if args:
                args = (_rows(hidden, self._kept), *args[1:])
            else:
                kwargs[next(iter(kwargs))] = _rows(hidden, self._kept)
        return args, kwargs

    def _narrow(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Everything but the hidden state, of the text positions: masks, positions, rotations."""
        first = next(iter(kwargs)) if not args else None
        rest = {k: self._cut(v) for k, v in kwargs.items() if k != first}
        if first is not None:
            return args, {first: kwargs[first], **rest}
        return (args[0], *(self._cut(a) for a in args[1:])), rest

    def _cut(self, value: Any) -> Any:
        """`value` without what belongs to visual positions, if it is a tensor or a tuple of tensors over the row."""
        if isinstance(value, (tuple, list)):
            return pytree.tree_map_only(Tensor, self._cut, value)
        if not isinstance(value, Tensor) or self._kept is None:
            return value
        kept, prefill = self._kept.to(value.device), self._away is not None
        if value.dim() == 4 and value.shape[-1] >= self._row:  # a mask [samples, heads, queries, keys]
            if prefill:
                value = _rows(value.expand(len(kept), -1, -1, -1), kept, 2)
            new = torch.arange(self._row, value.shape[-1], device=kept.device).expand(len(kept), -1)
            return _rows(value.expand(len(kept), -1, -1, -1), torch.cat([kept, new], 1), 3)
        if not prefill or value.dim() == 0:
            return value
        if value.dim() == 1 and len(value) == self._row:
            return value[kept[0]]
        if value.dim() >= 2 and value.shape[1] == self._row:
            return _rows(value.expand(len(kept), *value.shape[1:]), kept)
        return value

    def _come_back(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The whole row again: text as it is now, visual positions as they left."""
        if self._away is None:
            return None
        hidden = output if isinstance(output, Tensor) else output[0]
        kept = self._kept.to(hidden.device)  # type: ignore[union-attr]
        index = kept.reshape(*kept.shape, *[1] * (hidden.dim() - 2)).expand_as(hidden)
        whole = self._away.scatter(1, index, hidden)
        self._away = None
        return whole if isinstance(output, Tensor) else (whole, *output[1:])


def _rows(tensor: Tensor, kept: Tensor | None, dim: int = 1) -> Tensor:
    """``tensor`` at the positions ``kept [samples, n]`` of its dimension `dim`, for each sample its own."""
    assert kept is not None
    shape = [1] * tensor.dim()
    shape[0], shape[dim] = kept.shape
    wanted = list(tensor.shape)
    wanted[dim] = kept.shape[1]
    return tensor.gather(dim, kept.to(tensor.device).reshape(shape).expand(wanted))


def _named(batch: Any, ids: Any) -> Mapping[str, Any]:
    return batch if isinstance(batch, Mapping) else {"input_ids": ids, **inputs_of(batch)[1]}


def _place(model: nn.Module, name: str) -> tuple[str, int]:
    """The module list that holds the block `name`, or a module within it, and the block's index there."""
    modules = dict(model.named_modules())
    if name not in modules:
        raise UnknownName("block", name, [n for n in modules if n.rpartition(".")[2].isdigit()])
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        owner = ".".join(parts[: end - 1])
        if isinstance(modules[owner], nn.ModuleList):
            return owner, list(modules[owner]._modules).index(parts[end - 1])
    raise ModelError(
        f"{name!r} is in no module list: name one of the repeated blocks, such as 'model.language_model.layers.12'"
    )
