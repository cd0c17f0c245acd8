"""``module:callable`` and ``file.py:callable``: batches or a dataset that the user's own code makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from secateur.data.batches import Batch
from secateur.data.registry import DATA, Samples
from secateur.errors import DataError
from secateur.models.loaded import Loaded
from secateur.sources import CALLABLE, Source, blaming, call, find_callable


@dataclass(frozen=True)
class MapSamples:
    """A torch map-style dataset, collated as a DataLoader does."""

    dataset: Any
    name: str
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples, collated by torch's default_collate."""
        with blaming(f"the dataset of {self.name}", DataError):
            batch = default_collate([self.dataset[i] for i in indices])
        return tuple(batch) if isinstance(batch, list) else batch


@DATA.register(CALLABLE, source="the user's own code")
def from_callable(source: Source, loaded: Loaded | None, **options: Any) -> Samples | Iterable[Batch]:
    """``module:callable?key=value``: returns an iterable of batches, or a torch map-style Dataset of samples.

    A parameter called ``loaded`` receives the loaded model (with its tokenizer) without being given in the source.
    """
    function, source = find_callable(source)
    made = call(function, source, loaded=loaded)
    if isinstance(made, Dataset) and not isinstance(made, IterableDataset):
        return MapSamples(made, source.rest)
    if isinstance(made, (Tensor, Mapping, str, bytes)) or not isinstance(made, (Iterable, DataLoader)):
        raise DataError(f"{source.rest!r} returned a {type(made).__name__}; expected an iterable of batches or a torch Dataset")
    return made
