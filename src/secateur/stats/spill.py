"""Hidden states between two blocks: in memory as far as it reaches, the rest in a file that vanishes with the process."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from secateur.errors import DataError
from secateur.memory import available_memory

log = logging.getLogger("secateur")
_SHARE = 0.25  # of the memory that is left


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in the file."""

    begin: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Of its values."""
        return self.shape.numel() * self.dtype.itemsize


class Spill:
    """Keeps tensors: the first `budget` bytes in memory, by default a quarter of what is left, the others in a file.

    The file has no name: it is gone once the process ends, however that happens. It lies in `folder`, or where temporary
    files do. Raises DataError where it cannot be written.
    """

    def __init__(self, budget: int | None = None, folder: Path | None = None):
        self._budget = int(_SHARE * available_memory()) if budget is None else budget
        self._folder, self._file, self._end = folder, None, 0
        self._in_memory = 0

    @property
    def spilled(self) -> int:
        """Bytes in the file."""
        return self._end

    def keep(self, tensor: Tensor, instead: Tensor | Slot | None = None) -> Tensor | Slot:
        """`tensor` itself, or where it lies now. `instead` is what was kept before in its place and is let go."""
        if isinstance(instead, Tensor):
            self._in_memory -= instead.nbytes
        if self._in_memory + tensor.nbytes <= self._budget:
            self._in_memory += tensor.nbytes
            return tensor
        return self._write(tensor, instead if isinstance(instead, Slot) else None)

    def get(self, kept: Tensor | Slot) -> Tensor:
        """What was given to `keep`."""
        if isinstance(kept, Tensor):
            return kept
        assert self._file is not None
        raw = torch.empty(kept.bytes, dtype=torch.uint8)
        self._file.seek(kept.begin)
        if self._file.readinto(raw.numpy().data) != kept.bytes:  # type: ignore[attr-defined]
            raise DataError(f"the file of hidden states in {self._place} ends too early: it was changed from outside")
        return raw.view(kept.dtype).reshape(kept.shape).to(kept.device)

    @property
    def _place(self) -> str:
        return str(self._folder or tempfile.gettempdir())

    def _write(self, tensor: Tensor, old: Slot | None) -> Slot:
        fits = old is not None and old.bytes == tensor.nbytes
        slot = Slot(old.begin if old is not None and fits else self._end, tensor.shape, tensor.dtype, tensor.device)
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        try:
            file = self._opened()
            file.seek(slot.begin)
            file.write(raw)
            file.flush()
        except OSError as error:
            raise DataError(
                f"the hidden states do not fit in memory, and {self._place} cannot take them: {error.strerror or error}. Free "
                "space there, give fewer calibration samples, or set TMPDIR to a larger disk."
            ) from error
        self._end = max(self._end, slot.begin + slot.bytes)
        return slot

    def _opened(self) -> BinaryIO:
        if self._file is None:
            log.info("hidden states beyond %.1f GB are kept in %s", self._budget / 1e9, self._place)
            self._file = tempfile.TemporaryFile(dir=self._folder)  # type: ignore[assignment]  # noqa: SIM115 - lives as long
        return self._file  # type: ignore[return-value]
