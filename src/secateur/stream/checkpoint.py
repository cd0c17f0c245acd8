"""A directory of safetensors shards, read one tensor at a time and never mapped: what is let go of is really gone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from secateur.errors import ModelError
from secateur.export.container import Container, Entry
from secateur.measure.cache import fingerprint


class Checkpoint:
    """The tensors of all ``*.safetensors`` files in `folder`, by name. Raises ModelError where there are none."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self._open: dict[str, Container] = {}
        self._shard: dict[str, str] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open[path.name] = container = Container.open(path)
            for name in container.entries:
                if name in self._shard:
                    raise ModelError(
                        f"{self.folder}: {name!r} is in {self._shard[name]} and in {path.name}; remove one of them"
                    )
                self._shard[name] = path.name
        if not self._open:
            raise ModelError(f"{str(self.folder)!r} holds no .safetensors file, and only those are streamed")

    def __contains__(self, name: object) -> bool:
        return name in self._shard

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard)

    @property
    def shards(self) -> dict[str, list[str]]:
        """The names of the tensors in each file."""
        return {shard: list(container.entries) for shard, container in self._open.items()}

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(e.end - e.begin for container in self._open.values() for e in container.entries.values())

    def entry(self, name: str) -> Entry:
        """Type, shape and place of a tensor."""
        return self._open[self._shard[name]].entries[name]

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        return self._open[self._shard[name]].read(name)

    def identity(self) -> str:
        """A digest of names, places, sizes and times of change: reading every bit would take as long as pruning."""
        facts = []
        for shard, container in self._open.items():
            stat = (self.folder / shard).stat()
            places = [[n, str(e.dtype), list(e.shape), e.begin] for n, e in container.entries.items()]
            facts.append([shard, stat.st_size, stat.st_mtime_ns, places])
        return fingerprint(facts)

    def close(self) -> None:
        """Close the files."""
        for container in self._open.values():
            container.file.close()
