"""``folder:DIR``: a folder of images, in a subfolder for each class, or flat and then without labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.data.batches import Batch
from secateur.data.images import Preparation, decode, preparation, stack
from secateur.data.registry import DATA, Samples
from secateur.errors import DataError
from secateur.models.loaded import Loaded
from secateur.sources import Source

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))


@dataclass(frozen=True)
class ImageFiles:
    """Image files, and the index of each one's class where they have one."""

    files: tuple[Path, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None
    prepare: Preparation

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Sequence[int]) -> Batch:
        """``(images, labels)``, or the images alone."""
        names = [str(self.files[i]) for i in indices]
        pixels = stack([decode(self.files[i], str(self.files[i]), self.prepare) for i in indices], names)
        x = self.prepare.scale(pixels)
        return x if self.labels is None else (x, torch.tensor([self.labels[i] for i in indices]))


@DATA.register("folder", source="the layout of torchvision.datasets.ImageFolder")
def from_folder(
    source: Source,
    loaded: Loaded | None,
    *,
    size: Any = None,
    resize: int | None = None,
    mean: Any = None,
    std: Any = None,
    gray: bool | None = None,
    interpolation: str | None = None,
) -> Samples:
    """``folder:DIR?size=224&mean=imagenet``: classes are the subfolders in the order of their names."""
    root = source.path("image folder")
    if not root.is_dir():
        raise DataError(f"{source.rest!r} is not a folder")
    prepare = preparation(loaded, size=size, resize=resize, mean=mean, std=std, gray=gray, interpolation=interpolation)
    flat = [p for p in sorted(root.iterdir()) if p.is_file() and p.suffix.lower() in EXTENSIONS]
    below = {p.name: _images(p) for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    below = {name: files for name, files in below.items() if files}
    if flat and below:
        raise DataError(f"the folder {source.rest!r} has images beside class folders ({flat[0].name}, {next(iter(below))}/)")
    if not flat and not below:
        raise DataError(f"the folder {source.rest!r} holds no images ({', '.join(sorted(EXTENSIONS))})")
    if flat:
        return ImageFiles(tuple(flat), None, None, prepare)
    pairs = [(file, label) for label, files in enumerate(below.values()) for file in files]
    return ImageFiles(tuple(f for f, _ in pairs), tuple(n for _, n in pairs), tuple(below), prepare)


def _images(folder: Path) -> list[Path]:
    found = (Path(top) / name for top, _, names in os.walk(folder) for name in names)
    return sorted(p for p in found if p.suffix.lower() in EXTENSIONS)
