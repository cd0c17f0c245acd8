"""A file that is opened for reading, checked, and closed at the end of a block."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

from secateur.errors import ArtifactError

T = TypeVar("T", bound="Opened")


class Opened:
    """What a reader of a file format is built on: its constructor checks the file and raises ArtifactError.

    `name` is the file's name in error messages.
    """

    buffering = -1  #: as of the builtin open; 0 for readers that take large pieces into memory of their own

    def __init__(self, file: BinaryIO, name: str):
        self.file, self.name = file, name

    @classmethod
    def open(cls: type[T], path: Path) -> T:
        """The file at `path`. The caller closes it, or uses it as a context."""
        try:
            file = open(path, "rb", buffering=cls.buffering)  # noqa: SIM115 - closed by the context
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
        try:
            return cls(file, str(path))  # type: ignore[arg-type]
        except ArtifactError:
            file.close()
            raise

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()
