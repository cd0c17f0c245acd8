"""``npz:FILE``: arrays of samples and labels, or encoded images end to end, in NumPy's archive."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.data.batches import Batch
from secateur.data.images import Preparation, decode, import_pillow, preparation, stack
from secateur.data.registry import DATA, Samples
from secateur.errors import DataError, did_you_mean
from secateur.models.loaded import Loaded
from secateur.sources import Source

_SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
_ROLES = {
    "x": ("x", "image", "images", "data", "input", "inputs", "features", "arr_0"),
    "y": ("y", "label", "labels", "target", "targets", "arr_1"),
    "jpeg": ("jpeg", "jpegs", "x_jpeg", "png", "x_png", "encoded"),
    "offset": ("offset", "offsets", "x_offset"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_LAYOUTS = ("nchw", "nhwc", "nhw", "flat")


@dataclass(frozen=True)
class Arrays:
    """Samples in an array: uint8 are pixels, ``[n, channels, height, width]`` by now; other types are passed as they are."""

    x: Tensor
    y: Tensor | None
    prepare: Preparation
    flat: bool
    name: str
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Sequence[int]) -> Batch:
        """``(x, labels)``, or the samples alone."""
        x = self.x[torch.as_tensor(indices)]
        if x.dtype == torch.uint8:
            x = self.prepare.scale(self._resized(x) if x.dim() == 4 else x)
        elif x.is_floating_point() and x.dim() == 4:
            x = self.prepare.normalise(x)
        x = x.flatten(1) if self.flat else x
        return x if self.y is None else (x, self.y[torch.as_tensor(indices)])

    def _resized(self, x: Tensor) -> Tensor:
        size, channels = self.prepare.size, self.prepare.channels
        if (size is None or x.shape[2:] == size) and (channels is None or x.shape[1] == channels):
            return x
        pil = import_pillow()
        images = (pil.fromarray(i[0].numpy() if len(i) == 1 else i.permute(1, 2, 0).contiguous().numpy()) for i in x)
        return torch.stack([self.prepare.image(i) for i in images])


@dataclass(frozen=True)
class EncodedImages:
    """Image files end to end in `data`; image i is ``data[offset[i]:offset[i + 1]]``, decoded when it is asked for."""

    data: np.ndarray
    offset: np.ndarray
    y: Tensor | None
    prepare: Preparation
    flat: bool
    name: str
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.offset) - 1

    def batch(self, indices: Sequence[int]) -> Batch:
        """``(images, labels)``, or the images alone."""
        names = [f"{i} of {self.name}" for i in indices]
        images = [
            decode(self.data[self.offset[i] : self.offset[i + 1]].tobytes(), name, self.prepare)
            for i, name in zip(indices, names, strict=True)
        ]
        x = self.prepare.scale(stack(images, names))
        x = x.flatten(1) if self.flat else x
        return x if self.y is None else (x, self.y[torch.as_tensor(indices)])


@DATA.register("npz", source="numpy.savez")
def from_npz(
    source: Source,
    loaded: Loaded | None,
    *,
    split: str | None = None,
    layout: str | None = None,
    size: Any = None,
    resize: int | None = None,
    mean: Any = None,
    std: Any = None,
    gray: bool | None = None,
    interpolation: str | None = None,
) -> Samples:
    """``npz:FILE?split=test``: arrays x and y (or images, labels, x_train, test_y ...), or jpeg, offset and label.

    uint8 arrays are pixels: divided by 255, and resized and normalised as the options or the model say. Arrays of floats
    are taken as they are, normalised only by `mean` and `std` given here; integers are kept. `layout` is nchw, nhwc, nhw or
    flat (each sample one vector).
    """
    path = source.path("npz file")
    if layout is not None and layout not in _LAYOUTS:
        raise DataError(f"layout {layout!r} is not one of {', '.join(_LAYOUTS)}")
    options = {"size": size, "resize": resize, "mean": mean, "std": std, "gray": gray, "interpolation": interpolation}
    with _opened(path) as archive:
        roles = _split(archive, split, path)
        parts = {role: _read(archive, key, path) for role, key in roles.items()}
    flat = layout == "flat"
    if "jpeg" in parts:
        prepare = preparation(loaded, **options)
        offset = _offsets(parts, path)
        y = _labels(parts.get("y"), len(offset) - 1, path)
        return EncodedImages(parts["jpeg"], offset, y, prepare, flat, path.name)
    x = _samples(parts["x"], None if flat else layout, path)
    if x.dtype != torch.uint8 and any(v is not None for v in (size, resize, gray)):
        raise DataError(f"the samples in {str(path)!r} are {parts['x'].dtype}: only uint8 images can be resized or made gray")
    prepare = preparation(loaded if x.dtype == torch.uint8 else None, **options)
    return Arrays(x, _labels(parts.get("y"), len(x), path), prepare, flat, path.name)


def _opened(path: Path) -> Any:
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{str(path)!r} is not an npz archive: {str(error).partition(chr(10))[0] or 'it is empty'}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"{str(path)!r} holds one bare array; save it with numpy.savez(file, x=..., y=...)")
    if not archive.files:
        raise DataError(f"{str(path)!r} is an empty archive: it holds no arrays")
    return archive


def _split(archive: Any, split: str | None, path: Path) -> dict[str, str]:
    """Role -> key of the split asked for, or of the only one."""
    found: dict[str, dict[str, str]] = {}
    for key in archive.files:
        name, role = _role(key)
        if role is not None:
            found.setdefault(name, {})[role] = key
    usable = {name: roles for name, roles in found.items() if "x" in roles or {"jpeg", "offset"} <= roles.keys()}
    held = ", ".join(archive.files)
    if not usable:
        raise DataError(
            f"{str(path)!r} has no samples: it holds {held}. Expected x and y, images and labels, or jpeg, offset and label."
        )
    if split is None and len(usable) == 1:
        return next(iter(usable.values()))
    names = [name or "none" for name in usable]
    if split is None:
        raise DataError(f"{str(path)!r} holds several splits ({', '.join(names)}): choose one with ?split={names[-1]}")
    wanted = _SPLITS.get(str(split).lower(), str(split))
    if wanted not in usable:
        raise DataError(f"{str(path)!r} has no split {split!r}{did_you_mean(wanted, names)} It holds {held}.")
    return usable[wanted]


def _role(key: str) -> tuple[str, str | None]:
    """``"test_x"`` or ``"x_test"`` -> ``("test", "x")``; a key that says neither has the role None."""
    words = key.lower().split("_")
    for words_left, word in ((words[1:], words[0]), (words[:-1], words[-1])):
        if word in _SPLITS and words_left:
            return _SPLITS[word], _ROLE_OF.get("_".join(words_left))
    return "", _ROLE_OF.get(key.lower())


def _read(archive: Any, key: str, path: Path) -> np.ndarray:
    try:
        return archive[key]
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise DataError(f"{key!r} in {str(path)!r} holds pickled objects, which can run code: refused") from error
        raise DataError(f"{key!r} in {str(path)!r} is broken: {error}") from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise DataError(f"{key!r} in {str(path)!r} is broken: {error or type(error).__name__}") from error


def _offsets(parts: Mapping[str, np.ndarray], path: Path) -> np.ndarray:
    data, offset = parts["jpeg"], parts["offset"]
    if data.dtype != np.uint8 or data.ndim != 1 or offset.ndim != 1 or not np.issubdtype(offset.dtype, np.integer):
        raise DataError(f"encoded images in {str(path)!r} need uint8 bytes and whole offsets, each of one dimension")
    if len(offset) < 2:
        raise DataError(f"{str(path)!r} holds no images: its offsets have {len(offset)} entries")
    if offset[0] < 0 or offset[-1] > len(data) or (np.diff(offset.astype(np.int64)) <= 0).any():
        raise DataError(f"the offsets in {str(path)!r} do not rise from 0 to at most the {len(data)} bytes there are")
    return offset.astype(np.int64)


def _labels(y: np.ndarray | None, samples: int, path: Path) -> Tensor | None:
    if y is None:
        return None
    if y.ndim == 0 or len(y) != samples:
        raise DataError(
            f"{str(path)!r} has {samples} samples and {len(y) if y.ndim else 'scalar'} labels: they must be as many"
        )
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind in "iub":
        return torch.from_numpy(y.astype(np.int64))
    if y.dtype.kind == "f":
        return torch.from_numpy(y.astype(np.float32))
    raise DataError(f"the labels in {str(path)!r} are {y.dtype}; expected whole numbers or floats")


def _samples(x: np.ndarray, layout: str | None, path: Path) -> Tensor:
    """The samples as a tensor, images as ``[n, channels, height, width]``."""
    if x.ndim == 0 or len(x) == 0:
        raise DataError(f"{str(path)!r} holds no samples: the shape of x is {x.shape}")
    if x.dtype.kind not in "iubf":
        raise DataError(f"the samples in {str(path)!r} are {x.dtype}; expected numbers")
    if x.dtype.kind == "f":
        x = x.astype(np.float32, copy=False)
    elif x.dtype != np.uint8:
        x = x.astype(np.int64, copy=False)
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    layout = layout or _guess(x)
    if layout and tensor.dim() != len(layout):
        raise DataError(f"layout {layout} has {len(layout)} dimensions and x in {str(path)!r} has {tensor.dim()}: {x.shape}")
    if layout == "nhw":
        return tensor[:, None]
    return tensor.permute(0, 3, 1, 2) if layout == "nhwc" else tensor


def _guess(x: np.ndarray) -> str | None:
    """The layout of pixels that do not say it; arrays of other types are left as they are."""
    if x.dtype != np.uint8:
        return None
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3):
        return "nhwc"
    return "nhw" if x.ndim == 3 else None
