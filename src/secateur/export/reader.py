"""An artifact directory opened for reading: consistent while a writer replaces it, and trusted in nothing."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from torch import Tensor

from secateur.coding.packed import PackedFile
from secateur.errors import ArtifactError
from secateur.export import encode, manifest
from secateur.export.atomic import settled
from secateur.export.container import Container, hash_file
from secateur.types import Plan, Report

_TEXT_CAP = 512_000_000  # bytes of any other file that are read at most
_TRIES = 20


class Artifact:
    """The content of an artifact directory, checked as it is read: ``with Artifact(directory) as artifact``.

    The directory is held open, so that another process that replaces it meanwhile does not mix old and new. Raises
    ArtifactError for a directory that is missing, is none of ours, or is damaged.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.path = Path(directory)
        self._container: Container | PackedFile | None = None
        for _ in range(_TRIES):  # a writer may remove the directory between our opening it and its files
            self._handle = self._open_directory()
            try:
                self.manifest = manifest.parse(self._read_all(manifest.NAME, manifest.SIZE_CAP))
                self._weights = self._open(self.manifest.weights)
                return
            except BaseException as error:
                replaced = self._replaced()
                os.close(self._handle)
                if not (isinstance(error, ArtifactError) and replaced):
                    raise
        raise ArtifactError(f"{self.path} is being replaced again and again; try when its writer is done")

    def __enter__(self) -> Artifact:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._weights.close()
        os.close(self._handle)

    @property
    def plan(self) -> Plan | None:
        """The plan that was carried out, where one was saved."""
        return self.manifest.parsed_plan()

    @property
    def recipe(self) -> str | None:
        """The recipe as TOML, where one was saved."""
        return self.read(manifest.RECIPE).decode("utf-8", "replace") if manifest.RECIPE in self.manifest.files else None

    @property
    def report(self) -> Report | None:
        """The report, where one was saved."""
        if manifest.REPORT not in self.manifest.files:
            return None
        try:
            return Report.from_json(json.loads(self.read(manifest.REPORT)))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            what = f"{type(error).__name__}: {str(error)[:200]}"
            raise ArtifactError(f"{self.path / manifest.REPORT} is not a report of this version ({what})") from None

    def read(self, name: str) -> bytes:
        """The bytes of one of the files, after its hash was checked."""
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.path} has no {name}. It has: {', '.join(self.manifest.files)}.")
        with self._open(name) as file:
            self._check_hash(file, name)
            file.seek(0)
            return file.read(_TEXT_CAP)

    def weights(self) -> Container | PackedFile:
        """The weights file, after its hash and all that its header and the manifest say of each other were checked."""
        if self._container is not None:
            return self._container
        name = self.manifest.weights
        self._check_hash(self._weights, name)
        self._weights.seek(0)
        kind = PackedFile if name == manifest.PACKED else Container
        container = kind(self._weights, str(self.path / name))
        keys: set[str] = set()
        for name, entry in self.manifest.tensors.items():
            encode.check_parts(name, entry, container)
            keys.update(encode.part_keys(name, entry))
        if extra := container.entries.keys() - keys:
            raise ArtifactError(f"{container.name} holds {min(extra)[:200]!r}, of which {manifest.NAME} knows nothing")
        self._container = container
        return container

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and values of every stored tensor, one at a time, on the CPU. Aliases are not repeated."""
        container = self.weights()
        for name, entry in self.manifest.tensors.items():
            yield name, encode.decode(name, entry, container)

    def masks_file(self) -> Container:
        """The file of stored masks, after its hash was checked. The caller closes it."""
        file = self._open(manifest.MASKS)
        try:
            self._check_hash(file, manifest.MASKS)
            file.seek(0)
            return Container(file, str(self.path / manifest.MASKS))
        except ArtifactError:
            file.close()
            raise

    def check_files(self) -> None:
        """Check the hash of every file but the weights, which `weights` checks."""
        for name in self.manifest.files.keys() - {self.manifest.weights}:
            with self._open(name) as file:
                self._check_hash(file, name)

    def verify(self) -> None:
        """Check the hash of every file, and decode every tensor. Raises ArtifactError at the first that is wrong."""
        self.check_files()
        for _ in self.tensors():
            pass

    def _open_directory(self) -> int:
        place = settled(self.path)
        try:
            return os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            what = {errno.ENOENT: "does not exist", errno.ENOTDIR: "is not a directory"}.get(error.errno or 0, error.strerror)
            raise ArtifactError(f"{self.path} {what}; expected an artifact directory, as sc.save writes it") from None

    def _replaced(self) -> bool:
        """Whether the path no longer leads to the directory that is open."""
        try:
            return not os.path.samestat(os.fstat(self._handle), os.stat(settled(self.path)))
        except FileNotFoundError:
            return True

    def _open(self, name: str) -> BinaryIO:
        """One plain file of the open directory: no link, no pipe, and nothing elsewhere."""
        try:
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._handle)
        except OSError as error:
            reasons = {errno.ENOENT: "is missing", errno.ELOOP: "is a symbolic link; copy the file itself"}
            raise ArtifactError(f"{self.path / name} {reasons.get(error.errno or 0, error.strerror)}") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise ArtifactError(f"{self.path / name} is not a regular file")
        return open(handle, "rb", buffering=0)  # type: ignore[return-value]

    def _read_all(self, name: str, cap: int) -> bytes:
        with self._open(name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > cap:
                raise ArtifactError(f"{self.path / name} has {size} bytes; at most {cap} are read")
            return file.read()

    def _check_hash(self, file: BinaryIO, name: str) -> None:
        entry = self.manifest.files[name]
        size = os.fstat(file.fileno()).st_size
        if size != entry.bytes:
            what = "truncated" if size < entry.bytes else "changed"
            raise ArtifactError(f"{self.path / name} has {size} bytes, {entry.bytes} were written: it is {what}")
        if hash_file(file) != entry.sha256:
            raise ArtifactError(f"{self.path / name} does not match its SHA-256: it was damaged or changed after it was saved")
