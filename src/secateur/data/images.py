"""From an image to the input of a network: decode, resize, centre crop, scale, normalise."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import DataError, MissingExtra
from secateur.models.loaded import IMAGENET_MEAN, IMAGENET_STD, Loaded

if TYPE_CHECKING:
    from PIL.Image import Image

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True)
class Preparation:
    """What is done to every image. None leaves that as the image has it; a `mean` or `std` has one value or one a channel."""

    size: tuple[int, int] | None = None  #: (height, width) after the centre crop
    resize: int | None = None  #: short side before it; None: just large enough for the crop
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str = "bilinear"

    def image(self, image: Image) -> Tensor:
        """A PIL image as uint8 ``[channels, height, width]``, resized and cropped."""
        image = image.convert(_MODES[self.channels]) if self.channels else image
        if self.size is not None:
            image = _fit(image, self.size, self.resize, self.interpolation)
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()

    def scale(self, pixels: Tensor) -> Tensor:
        """uint8 ``[n, channels, ...]`` -> float32, divided by 255 and normalised."""
        return self.normalise(pixels.float() / 255.0)

    def normalise(self, x: Tensor) -> Tensor:
        """``(x - mean) / std`` by channel, dimension 1; `x` itself where neither is known."""
        if self.mean is None and self.std is None:
            return x
        return (x - _channelwise(self.mean or (0.0,), x, "mean")) / _channelwise(self.std or (1.0,), x, "std")


def preparation(
    loaded: Loaded | None, *, size: Any, resize: Any, mean: Any, std: Any, gray: Any, interpolation: Any
) -> Preparation:
    """The options of a source over what the loaded model knows of its input. Raises DataError for an option out of range."""
    known = loaded.image if loaded is not None else None
    means, stds = _statistic(mean, IMAGENET_MEAN, "mean"), _statistic(std, IMAGENET_STD, "std")
    if mean == "imagenet" and std is None:
        stds = IMAGENET_STD
    if interpolation is not None and interpolation not in _INTERPOLATIONS:
        raise DataError(f"interpolation {interpolation!r} is not one of {', '.join(_INTERPOLATIONS)}")
    if stds is not None and min(stds) <= 0:
        raise DataError(f"std must be positive, got {std!r}")
    return Preparation(
        size=_size(size) or (known.size if known else None),
        resize=_side(resize) if resize is not None else (known.resize if known and size is None else None),
        channels=1 if gray else (known.channels if known else None),
        mean=means if means is not None else (known.mean if known else None),
        std=stds if stds is not None else (known.std if known else None),
        interpolation=interpolation or (known.interpolation if known else "bilinear"),
    )


def decode(encoded: bytes | Path, name: str, prepare: Preparation) -> Tensor:
    """An encoded image as uint8 ``[channels, height, width]``, resized and cropped. Raises DataError where it is unreadable."""
    pil = import_pillow()
    source: Any = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    try:
        with pil.open(source) as image:
            return prepare.image(image if prepare.channels else image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise DataError(f"the image {name} cannot be read: {str(error).partition(chr(10))[0]}") from error


def import_pillow() -> Any:
    """PIL.Image, or MissingExtra."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingExtra("pillow", "vision", "image data") from error
    return Image


def stack(images: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """Images of one size as one tensor. Raises DataError naming the first two of different sizes."""
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            first, other = ("x".join(map(str, i.shape)) for i in (images[0], image))
            raise DataError(
                f"images differ in size: {names[0]} is {first} and {name} is {other}. Give them one with ?size=224."
            )
    return torch.stack(list(images))


def _fit(image: Image, size: tuple[int, int], resize: int | None, interpolation: str) -> Image:
    pil = import_pillow()
    width, height = image.size
    scale = resize / min(width, height) if resize else max(size[0] / height, size[1] / width)
    scaled = max(round(width * scale), size[1]), max(round(height * scale), size[0])
    if scaled != image.size:
        image = image.resize(scaled, pil.Resampling[interpolation.upper()])
    left, top = round((image.width - size[1]) / 2), round((image.height - size[0]) / 2)
    return image.crop((left, top, left + size[1], top + size[0]))


def _channelwise(values: tuple[float, ...], x: Tensor, what: str) -> Tensor:
    channels = x.shape[1]
    if len(values) not in (1, channels):
        raise DataError(
            f"{what} has {len(values)} values and the images {channels} channels; give ?{what}= one, or one for each"
        )
    return torch.tensor(values, dtype=x.dtype).view(1, -1, *([1] * (x.dim() - 2)))


def _statistic(value: Any, imagenet: tuple[float, ...], what: str) -> tuple[float, ...] | None:
    if value is None:
        return None
    if value == "imagenet":
        return imagenet
    values = value if isinstance(value, tuple) else (value,)
    if not values or not all(isinstance(v, (int, float)) and np.isfinite(v) for v in values):
        raise DataError(f"{what}={value!r} is not 'imagenet', a number or numbers separated by commas")
    return tuple(float(v) for v in values)


def _size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, tuple) and len(value) == 2:
        return _side(value[0]), _side(value[1])
    return _side(value), _side(value)


def _side(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 16384:
        raise DataError(f"an image side of {value!r} is not a whole number of pixels from 1 to 16384")
    return value
