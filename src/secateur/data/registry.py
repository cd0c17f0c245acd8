"""The registry of data sources, and what each of them gives: samples that can be picked by index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

from secateur.data.batches import Batch
from secateur.registry import Registry


@runtime_checkable
class Samples(Protocol):
    """Samples that are made when they are asked for."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the labels, where the source states them."""

    def __len__(self) -> int:
        """How many there are."""

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples of these indices as one batch, in this order. Raises DataError naming a sample that is unfit."""


#: ``loader(source, request, **options)``: `Samples`, or an iterable of batches where a callable of the user's gives one.
Loader = Callable[..., "Samples | Iterable[Batch]"]
DATA: Registry[Loader] = Registry("data source")
