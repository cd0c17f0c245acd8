"""What every weight reads: pixels, tokens, or both. Found by following a batch through the model's own forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.data.batches import Batch, Batches, forward, inputs_of, samples_of, token_mask
from secateur.errors import DataError
from secateur.stats.guard import listed, ordinary, untouched

#: Parts of the names of arguments that say where things are and not what they are.
_NO_CONTENT = ("mask", "position", "token_type", "label", "target", "size", "shape", "grid", "return", "cache")
_PIXELS, _SOUND = ("pixel", "image", "video"), ("audio", "speech", "input_features", "input_values")
#: Operations whose result has the shape of a tensor and nothing of its content.
_SHAPE_ONLY = ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_")


@dataclass(frozen=True)
class Row:
    """How tokens stand in one row with other positions: how many come before them, and where images begin and end."""

    before: int
    images: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Reads:
    """The modalities that reach each weight, and how tokens stand among other positions.

    `modalities` is by the parameter's name; a parameter that no operation used is not in it. `joined` tells, of inputs that
    have so many positions beside the tokens, how these stand.
    """

    modalities: Mapping[str, frozenset[str]]
    joined: Mapping[int, Row]

    def reaching(self, names: Collection[str]) -> frozenset[str]:
        """The modalities that reach any of the parameters `names`."""
        return frozenset().union(*(self.modalities.get(n, frozenset()) for n in names))

    def positions(self, names: Collection[str], seen: tuple[int, ...], mask: Tensor) -> Tensor | None:
        """Of the token mask ``[batch, tokens]`` the one for an input of the parameters `names`; None = nothing is padding.

        `seen` is the input's shape. What reads only pixels has no tokens to leave out. Tokens that were joined to image
        positions are found where they stand; a mask that does not fit is handed back as it is, for the caller to say so.
        """
        found = self.reaching(names)
        if found and "text" not in found:
            return None
        extra = seen[1] - mask.shape[1] if len(seen) >= 3 else 0
        if extra <= 0 or extra not in self.joined:
            return mask
        before = self.joined[extra].before
        return torch.nn.functional.pad(mask, (before, extra - before), value=True)


def modality_of(name: str, value: Any) -> str | None:
    """The modality of an argument: ``vision``, ``text`` or ``audio``; None for masks, positions and all else.

    Example:
        >>> modality_of("input_ids", torch.tensor([[1, 2]])), modality_of("attention_mask", torch.ones(1, 2))
        ('text', None)
    """
    if not isinstance(value, Tensor) or value.dim() == 0 or value.dtype == torch.bool:
        return None
    if any(word in name for word in _NO_CONTENT):
        return None
    if not value.is_floating_point():
        return "text"
    if any(word in name for word in _SOUND):
        return "audio"
    if value.dim() >= 4 or any(word in name for word in _PIXELS):
        return "vision"
    return "text" if "embeds" in name else None


def inputs_by_modality(batch: Batch) -> dict[str, list[Tensor]]:
    """The tensors of a batch that carry content, by modality: labels and masks are left out."""
    args, kwargs = inputs_of(batch)
    found: dict[str, list[Tensor]] = {}
    for name, value in [*kwargs.items(), *(("", leaf) for leaf in pytree.tree_leaves(args))]:
        modality = modality_of(name, value)
        if modality is not None:
            found.setdefault(modality, []).append(value)
    return found


def is_multimodal(batch: Batch) -> bool:
    """Whether a batch holds inputs of more than one modality."""
    return len(inputs_by_modality(batch)) > 1


def check_modalities(batch: Batch, index: int, wanted: Collection[str]) -> None:
    """Raise DataError where batch number `index` lacks a modality that the first one had."""
    if missing := sorted(set(wanted) - set(inputs_by_modality(batch))):
        what = " and ".join({"vision": "images", "text": "tokens"}.get(m, m) for m in missing)
        raise DataError(
            f"batch {index} of the data has no {what}, which the first batch has. Give every batch the same inputs."
        )


def find_reads(model: nn.Module, batch: Batch, *, seed: int = 0) -> Reads:
    """What each parameter of `model` reads, from one forward pass of the first sample of `batch`.

    Every result carries the modalities of what it was computed from; a parameter reads what the operations that use it combine
    it with. The model is left as it was.
    """
    sample = next(samples_of(ordinary(batch)))
    mask = token_mask(sample)
    with untouched(model, [], seed), torch.no_grad():
        tracer = _Tracer(model, sample, 0 if mask is None else mask.shape[1])
        with tracer:
            forward(model, sample)
    return Reads({name: frozenset(found) for name, found in tracer.reads.items()}, tracer.joined)


def reads_of(model: nn.Module, batches: Batches, seed: int = 0) -> Reads | None:
    """`find_reads` on the first of `batches` where that holds several modalities; None where tokens are all there is."""
    first = next(iter(batches))
    return find_reads(model, first, seed=seed) if is_multimodal(first) else None


def check_called(model: nn.Module, names: Collection[str], reads: Reads, batch: Batch) -> None:
    """Raise DataError where the batch reaches none of some layers, naming the arguments of the forward that it lacks."""
    missing = [name for name in names if name not in reads.modalities]
    if not missing:
        return
    given = inputs_of(batch)[1]
    known = inspect.signature(model.forward).parameters
    lacking = [n for n in known if n not in given and any(word in n for word in (*_PIXELS, *_SOUND, "input_ids"))]
    hint = f" The model also takes {', '.join(lacking)}." if given and lacking else ""
    what = ", ".join(given) or "a tensor"
    raise DataError(
        f"the first batch ({what}) does not reach {len(missing)} of the layers: {listed(missing)}.{hint}"
        " Give batches with every input, or leave these layers out with ignore=."
    )


class _Tracer(TorchDispatchMode):
    """Carries modalities from tensor to tensor, by the memory they lie in, so that views and writes in place are seen."""

    def __init__(self, model: nn.Module, batch: Batch, tokens: int):
        super().__init__()
        self.reads: dict[str, set[str]] = {}
        self.joined: dict[int, Row] = {}
        self._tokens = tokens
        # A weak reference keeps the address from being used again, and not the memory.
        self._carried: dict[int, tuple[StorageWeakRef, frozenset[str], frozenset[str]]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._add(parameter, frozenset(), frozenset({name}))
        for modality, tensors in inputs_by_modality(batch).items():
            for tensor in tensors:
                self._add(tensor, frozenset({modality}), frozenset())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carries the operation out and passes on what its arguments carry."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        carried = [self._of(tensor) for tensor in given]
        content = frozenset().union(*(c for c, _ in carried))
        names = frozenset().union(*(n for _, n in carried))
        name = func.name().removeprefix("aten::")
        if not content and not names:
            return result
        if name.startswith(_SHAPE_ONLY):
            return result
        if content:
            for parameter in names:
                self.reads.setdefault(parameter, set()).update(content)
        if name == "cat":
            self._join(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor, content, frozenset() if content else names)
        return result

    def _of(self, tensor: Tensor) -> tuple[frozenset[str], frozenset[str]]:
        """The modalities that a tensor carries, and the parameters that it is made of alone."""
        _, content, names = self._carried.get(_key(tensor), (None, frozenset(), frozenset()))
        return content, names

    def _add(self, tensor: Tensor, content: frozenset[str], names: frozenset[str]) -> None:
        before, made_of = self._of(tensor)
        self._carried[_key(tensor)] = (StorageWeakRef(tensor.untyped_storage()), before | content, made_of | names)

    def _join(self, parts: Any, dim: int) -> None:
        """Note how many positions come before the tokens, where tokens and others are put in one row."""
        if any(p.dim() != 3 for p in parts) or dim not in (1, -2) or not self._tokens:
            return
        of_text = [i for i, p in enumerate(parts) if self._of(p)[0] == {"text"} and p.shape[1] == self._tokens]
        extra = sum(p.shape[1] for p in parts) - self._tokens
        if len(of_text) == 1 and extra:
            starts = [sum(p.shape[1] for p in parts[:i]) for i in range(len(parts))]
            images = [(a, a + p.shape[1]) for a, p in zip(starts, parts, strict=True) if self._of(p)[0] == {"vision"}]
            self.joined[extra] = Row(starts[of_text[0]], tuple(images))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
