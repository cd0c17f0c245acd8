"""What a batch is: how it is fed to a model, what its labels are, how it is split into samples, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import DataError, NonFiniteError

T = TypeVar("T")

#: A tensor; a tuple ``(inputs, labels)``; or a mapping of keyword arguments (a Hugging Face encoding is one).
Batch = Any
#: ``loss(model, batch) -> scalar tensor``, mean over the samples of the batch.
Loss = Callable[[nn.Module, Batch], Tensor]

_LABELS = ("labels", "label", "targets", "target")


def inputs_of(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments with which a model is called: labels are left out of tuples, kept in mappings."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise DataError("a batch is an empty tuple; expected (inputs, labels)")
        first = batch[0]
        if isinstance(first, Mapping):
            return (), dict(first)
        return (first,), {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise DataError(f"a batch is a {type(batch).__name__}; expected a tensor, a tuple (inputs, labels) or a mapping")


def arguments_of(batch: Batch) -> tuple[Any, ...] | dict[str, Any]:
    """The inputs of a batch as one example: a tuple of positional arguments, or a mapping of named ones."""
    args, kwargs = inputs_of(batch)
    return kwargs or args


def labels_of(batch: Batch) -> Tensor | None:
    """The labels of a batch, or None where it has none."""
    if isinstance(batch, Mapping):
        return next((batch[k] for k in _LABELS if k in batch), None)
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return torch.as_tensor(batch[1])
    return None


def token_mask(batch: Batch) -> Tensor | None:
    """The attention mask ``[batch, positions]`` of a mapping batch: padding is False. None where there is none."""
    _, kwargs = inputs_of(batch)
    mask = kwargs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def token_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """``[batch, positions, width] -> [batch, width]``: the mean over the positions that `mask` says are no padding."""
    if mask is None:
        return x.mean(1)
    weight = mask.to(x)[..., None]
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def forward(model: nn.Module, batch: Batch) -> Any:
    """``model(inputs)`` on the model's own device."""
    args, kwargs = inputs_of(to_device(batch, device_of(model)))
    return model(*args, **kwargs)


def output_tensor(output: Any) -> Tensor:
    """The tensor that counts in a model's output: itself, ``.logits``, or the first floating-point tensor inside."""
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    for leaf in pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise DataError(f"the model returned {type(output).__name__} without a floating-point tensor; pass your own loss=")


def default_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own ``.loss`` where it gives one, else cross-entropy of its logits with the batch's labels."""
    return loss_of(forward(model, batch), batch)


def loss_of(output: Any, batch: Batch) -> Tensor:
    """`default_loss` of an output that is there already."""
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    labels = labels_of(batch)
    if labels is None:
        raise DataError("these batches have no labels: give (inputs, labels), a mapping with 'labels', or your own loss=")
    logits = output_tensor(output)
    return F.cross_entropy(logits.float(), labels.to(logits.device))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`."""
    if isinstance(batch, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), batch)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; cpu for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def size_of(batch: Batch) -> int:
    """Number of samples: the first dimension that all tensors of the inputs share. Raises DataError where they differ."""
    args, kwargs = inputs_of(batch)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0]
    if not tensors:
        raise DataError("a batch holds no tensor with a batch dimension")
    labels = labels_of(batch)
    if labels is not None and labels.dim() > 0 and len(labels) != len(tensors[0]):
        raise DataError(f"a batch has {len(tensors[0])} inputs and {len(labels)} labels: they must be as many")
    return len(tensors[0])


def first_of(items: Iterable[T], count: int, size: Callable[[T], int]) -> list[T]:
    """The first items whose sizes together are at least `count`, or all; at least one.

    >>> first_of([3, 4, 5], 6, int)
    [3, 4]
    """
    chosen: list[T] = []
    for item in items:
        chosen.append(item)
        count -= size(item)
        if count <= 0:
            break
    return chosen


def first_batches(batches: Iterable[Batch], samples: int) -> list[Batch]:
    """The first batches that hold at least that many samples together, or all."""
    return first_of(batches, samples, size_of)


def samples_of(batch: Batch) -> Iterator[Batch]:
    """The batch as batches of one sample each."""
    size = size_of(batch)

    def pick(leaf: Any, i: int) -> Any:
        return leaf[i : i + 1] if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size else leaf

    for i in range(size):
        if isinstance(batch, Mapping):
            yield {k: pick(v, i) for k, v in batch.items()}
        else:
            yield pytree.tree_map(lambda leaf, i=i: pick(leaf, i), batch)


class Batches(Iterable[Batch]):
    """Batches that can be gone through again and again, checked as they pass.

    `data` is any iterable of batches. A one-shot iterator (a generator) is kept in memory, since pruning in several
    steps needs it several times. Raises DataError for no batches at all, for samples of no length, and for a source
    that gave batches once and none the next time.
    """

    def __init__(self, data: Iterable[Batch], *, limit: int | None = None):
        if isinstance(data, (Tensor, Mapping, str, bytes)) or not isinstance(data, Iterable):
            kind = type(data).__name__
            raise DataError(f"data must be an iterable of batches, got one {kind}. For a single batch, pass [batch].")
        self._data: Iterable[Batch] = list(data) if isinstance(data, Iterator) else data
        self._limit = limit
        self._seen: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        for batch in self._data:
            if self._limit is not None and count >= self._limit:
                break
            if size_of(batch) == 0:
                raise DataError(f"batch {count} of the data is empty: its first dimension is 0")
            check_batch(batch, count)
            yield batch
            count += 1
        if count == 0:
            what = "is exhausted: it gave batches before and none now" if self._seen else "gave no batches"
            raise DataError(f"the data {what}. Pass a list or a DataLoader, which can be read again.")
        self._seen = count

    @property
    def source(self) -> Iterable[Batch]:
        """What the batches come from: the iterable that was given, or the list that a one-shot iterator was kept in."""
        return self._data

    def shuffled(self, seed: int) -> Batches:
        """The batches in the order that the source gives for `seed`, where it has ``shuffled(seed)``; else as they are."""
        if not hasattr(self._data, "shuffled"):
            return self
        return Batches(self._data.shuffled(seed), limit=self._limit)

    def __len__(self) -> int:
        if self._seen is not None:
            return self._seen
        length = len(self._data)  # type: ignore[arg-type]
        return length if self._limit is None else min(length, self._limit)


def check_batch(batch: Batch, index: int) -> None:
    """Raise NonFiniteError where inputs of batch number `index` are NaN or infinite, DataError where all is padding."""
    args, kwargs = inputs_of(batch)
    mask = token_mask(batch)
    if mask is not None and not mask.any():
        raise DataError(f"batch {index} of the data is all padding: its attention_mask is zero everywhere. Leave it out.")
    named = [(k, v) for k, v in kwargs.items() if isinstance(v, Tensor)]
    named += [("inputs", t) for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
    for name, tensor in named:
        if tensor.is_floating_point() and tensor.numel() and not torch.isfinite(tensor.sum()):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise NonFiniteError(
                    f"batch {index} of the data: {name!r}, shape {tuple(tensor.shape)}, has {bad} NaN or infinite values"
                )
