"""What a streamed run has solved and written so far: parts of solved weights, then whole shards, each put in place at once."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.errors import ArtifactError
from secateur.export import container
from secateur.export.atomic import write_synced
from secateur.export.container import Container, Part
from secateur.resume import claim, give_up
from secateur.stream.checkpoint import Checkpoint

log = logging.getLogger("secateur")


class Store:
    """The state of a run in `folder`; one of another `key` is removed. Raises ArtifactError where it cannot be written."""

    def __init__(self, folder: Path, key: str, checkpoint: Checkpoint):
        self._folder, self._checkpoint = folder, checkpoint
        self.solved: dict[str, dict[str, Any]] = {}  #: what is known of each solved tensor
        self.notes: list[str] = []
        self._part_of: dict[str, Path] = {}
        self._written: dict[str, Path] = {}
        self.nonzeros: dict[str, int] = {}  #: of each written shard
        with _explained(folder):
            claim(folder, key)
            self._resume()

    @property
    def shards(self) -> Path:
        """Where finished shards wait until all are there."""
        return self._folder / "shards"

    def read(self, name: str) -> Tensor:
        """The tensor as it is now: solved if it was, else the checkpoint's."""
        for place in (self._part_of, self._written):
            if name in place:
                with Container.open(place[name]) as file:
                    return file.read(name)
        return self._checkpoint.read(name)

    def add(self, tensors: Mapping[str, Tensor], facts: Mapping[str, dict[str, Any]], notes: Iterable[str]) -> None:
        """Keep some solved tensors, and what is known of them."""
        number = len(list(self._folder.glob("*.json")))
        path = self._folder / f"{number}.safetensors"
        with _explained(self._folder):
            _write(path, [_part(name, tensor) for name, tensor in tensors.items()])
            record = {"tensors": dict(facts), "notes": list(notes)}
            _put(self._folder / f"{number}.json", json.dumps(record).encode())
        self._learn(record, path)

    def write_shards(self, prunable: Iterable[str]) -> None:
        """Write every shard of which all `prunable` tensors are solved, one tensor in memory at a time."""
        waiting = set(prunable) - self.solved.keys()
        for shard, names in self._checkpoint.shards.items():
            if shard in self.nonzeros or waiting & set(names):
                continue
            nonzeros = 0

            def make(name: str) -> Tensor:
                nonlocal nonzeros
                tensor = self.read(name)
                nonzeros += int(tensor.count_nonzero())
                return tensor

            entries = {name: self._checkpoint.entry(name) for name in names}
            parts = [Part(n, e.dtype, e.shape, lambda n=n: make(n)) for n, e in entries.items()]  # type: ignore[misc]
            with _explained(self._folder):
                self.shards.mkdir(exist_ok=True)
                _write(self.shards / shard, parts)
                _put(self.shards / f"{shard}.json", json.dumps(nonzeros).encode())
            self._finished(shard, nonzeros)

    def clear(self) -> None:
        """The run is finished: remove its state."""
        give_up(self._folder)

    def _resume(self) -> None:
        for number in range(len(list(self._folder.glob("*.json")))):
            record = json.loads((self._folder / f"{number}.json").read_text())
            self._learn(record, self._folder / f"{number}.safetensors")
        for shard in self._checkpoint.shards:
            if (count := self.shards / f"{shard}.json").exists():
                self._finished(shard, json.loads(count.read_text()))
        if self.solved:
            log.warning("resuming after %d layers and %d shards", len(self.solved), len(self.nonzeros))

    def _learn(self, record: Mapping[str, Any], path: Path) -> None:
        self.solved.update(record["tensors"])
        self.notes += [note for note in record["notes"] if note not in self.notes]
        self._part_of.update(dict.fromkeys(record["tensors"], path))

    def _finished(self, shard: str, nonzeros: int) -> None:
        """The shard has its tensors for good: parts that hold nothing else are let go of."""
        self.nonzeros[shard] = nonzeros
        for name in self._checkpoint.shards[shard]:
            self._written[name] = self.shards / shard
            path = self._part_of.pop(name, None)
            if path is not None and path not in self._part_of.values():
                path.unlink(missing_ok=True)


def _part(name: str, tensor: Tensor) -> Part:
    return Part(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _write(path: Path, parts: list[Part]) -> None:
    with _whole(path) as temporary:
        container.write(temporary, parts, metadata={"format": "pt"})


def _put(path: Path, data: bytes) -> None:
    with _whole(path) as temporary:
        write_synced(temporary, data)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Where to write a file that is to be at `path` whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    yield temporary
    os.replace(temporary, path)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turns a disk that is full, or cannot be written, into one sentence."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"cannot write {folder}: {error.strerror or error}. What is there stays. Free space and run again: it goes on from "
            "there."
        ) from error
