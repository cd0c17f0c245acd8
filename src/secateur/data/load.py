"""`load_data`: one line of text in, batches out that can be gone through again and again."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from secateur.data.batches import Batch, Batches, check_batch, samples_of, size_of
from secateur.data.registry import DATA, Samples
from secateur.errors import DataError, NonFiniteError
from secateur.models.loaded import Loaded
from secateur.sources import Source, parse_source


@dataclass(frozen=True)
class Dataset(Iterable[Batch]):
    """Samples in an order, given in batches, made when they are reached. Every pass gives the same batches.

    `order` holds the index of each sample; ``len`` is the number of batches, of which the last may be smaller.
    """

    samples: Samples
    order: Sequence[int]
    batch_size: int
    name: str  #: the canonical source

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.order), self.batch_size):
            indices = self.order[start : start + self.batch_size]
            batch = self.samples.batch(indices)
            try:
                check_batch(batch, start // self.batch_size)
            except NonFiniteError as error:
                raise DataError(f"{self.name}, samples {indices[0]} to {indices[-1]}: {error}") from error
            yield batch

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.order)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the labels, where the source states them."""
        return self.samples.classes

    def shuffled(self, seed: int) -> Dataset:
        """The same samples in an order drawn from `seed`: give each epoch its own."""
        permutation = torch.randperm(len(self.order), generator=torch.Generator().manual_seed(seed)).tolist()
        return replace(self, order=[self.order[i] for i in permutation])

    def take(self, samples: int) -> Dataset:
        """The first `samples` samples; all of them where there are fewer."""
        return replace(self, order=self.order[:samples])


def load_data(
    source: str,
    *,
    batch_size: int = 32,
    loaded: Loaded | None = None,
    limit: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
) -> Dataset | Batches:
    """Batches of what `source` names: ``(inputs, labels)`` or inputs alone for arrays and images, mappings for text.

    Sources: ``folder:DIR``, ``npz:FILE``, ``text:FILE``, ``module:callable`` and ``file.py:callable``, each with options
    (``?size=224&split=test``, see their docstrings) and a slice of samples before them: ``npz:images.npz[0::2]?size=224``.
    Images are prepared as `loaded` knows, text is tokenised with its tokenizer. The slice comes first, then, with
    `shuffle`, an order drawn from `seed`, then `limit`, in samples. Where a callable gives batches of its own, they
    are checked and passed on as they are, `limit` cutting the last.

    Raises DataError naming the source, the sample or the option at fault, and MissingExtra without Pillow.

    Example::

        loaded = load_model("timm:resnet18?pretrained=true")
        calibration = load_data("npz:imagenet_sample_1000.npz[0::2]", loaded=loaded, batch_size=50)
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise DataError(f"{name} must be a whole number of samples, at least 1, got {value!r}")
    parsed = _parse(source)
    entry = DATA[parsed.kind]
    if parsed.kind != "callable":
        entry.check_options("data source", parsed.options)
    made = entry.make(parsed, loaded, **parsed.options)
    if not isinstance(made, Samples):
        return _given(made, parsed, limit, shuffle)
    if len(made) == 0:
        raise DataError(f"{str(source)!r} holds no samples")
    order: Sequence[int] = range(len(made))[parsed.select or slice(None)]
    if not order:
        raise DataError(f"the slice of {str(source)!r} selects none of its {len(made)} samples")
    dataset = Dataset(made, order, batch_size, str(parsed))
    dataset = dataset.shuffled(seed) if shuffle else dataset
    return dataset if limit is None else dataset.take(limit)


@dataclass(frozen=True)
class _Limited(Iterable[Batch]):
    """Batches up to `limit` samples; the last one is cut."""

    batches: Iterable[Batch]
    limit: int

    def __iter__(self) -> Iterator[Batch]:
        left = self.limit
        for batch in self.batches:
            size = size_of(batch)
            if size > left:
                yield from list(samples_of(batch))[:left]
            else:
                yield batch
            left -= size
            if left <= 0:
                return


def _given(made: Iterable[Batch], parsed: Source, limit: int | None, shuffle: bool) -> Batches:
    if parsed.select is not None or shuffle:
        what = "a slice selects samples" if parsed.select is not None else "shuffling orders samples"
        raise DataError(f"{what}, and {parsed.rest!r} gives whole batches: let it return a torch Dataset")
    batches = Batches(made)
    return batches if limit is None else Batches(_Limited(list(batches) if isinstance(made, Iterator) else made, limit))


def _parse(source: str) -> Source:
    if isinstance(source, str) and ":" not in source and os.path.exists(source):
        kind = "folder" if os.path.isdir(source) else "npz" if source.endswith(".npz") else "text"
        raise DataError(f"the data source {source!r} has no kind. Did you mean {kind + ':' + source!r}?")
    return parse_source(source, DATA, DataError)
