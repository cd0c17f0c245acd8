"""Results of evaluations that took long, kept on disk line by line, so that what was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ArtifactError
from secateur.measure.sizes import dense_parts

log = logging.getLogger("secateur")
_FILE = "scan.jsonl"


class Cache:
    """Qualities by key in ``DIR/scan.jsonl``, one JSON line each; without a directory, in memory only.

    A line is written in one piece and synced. A line that a kill tore is ignored. Keys are digests, so that results of
    several models and settings live in one file.
    """

    def __init__(self, directory: str | None):
        self._path = None if directory is None else Path(directory) / _FILE
        self._found: dict[str, dict[str, float]] = {}
        self._torn = False
        if self._path is not None:
            self._read(self._path)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> dict[str, float]:
        return self._found[key]

    def put(self, key: str, quality: Mapping[str, float], **shown: Any) -> None:
        """Keep `quality` under `key`; `shown` is written beside it for people who read the file."""
        self._found[key] = dict(quality)
        if self._path is None:
            return
        line = json.dumps({"key": key, **shown, "quality": dict(quality)}) + "\n"
        data = ("\n" + line if self._torn else line).encode()
        try:
            self._append(data)
        except OSError as error:
            raise ArtifactError(
                f"cannot write {self._path}: {error}. What is in it stays; free space and run again."
            ) from error
        self._torn = False

    def _append(self, data: bytes) -> None:
        assert self._path is not None
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if os.write(descriptor, data) != len(data):
                self._torn = True
                raise OSError("the disk took only a part of a line")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _read(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise ArtifactError(f"cannot use {path.parent} as a cache: {error}") from error
        self._torn = bool(data) and not data.endswith(b"\n")
        for line in data.splitlines():
            try:
                record = json.loads(line)
                self._found[str(record["key"])] = {str(k): float(v) for k, v in record["quality"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                log.info("%s: a torn line is ignored", path)


def fingerprint(*parts: Any) -> str:
    """Digest of strings, numbers, mappings of them, tensors (dtype, shape and every bit) and modules (all that they hold)."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, nn.Module):
            named = (*part.named_parameters(), *part.named_buffers())
            part = fingerprint(*(x for name, tensor in named for x in (name, tensor)))
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            for piece in dense_parts(part.detach()):
                digest.update(piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(json.dumps(part, sort_keys=True).encode() + b"\0")
    return digest.hexdigest()
