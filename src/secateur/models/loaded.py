"""What a loaded model is: the network, and what its source knows of how it is fed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Task = Literal["image", "text-lm", "text-encoder", "other"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageInput:
    """How an image becomes the input of a network: resized, centre-cropped, scaled to 0..1, normalised by channel.

    `size` is (height, width) after the crop; `resize` the short side before it (None: as large as the crop, so that
    nothing but an uneven border is lost). `mean` and `std` have one value or one for each channel.
    """

    size: tuple[int, int]
    channels: int = 3
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    resize: int | None = None
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Loaded:
    """A model and what is known of it.

    A callable of the user's may return one instead of a bare module, to say more than a module can; `source` and `name`
    are then filled in for it.
    """

    model: nn.Module  #: in eval mode
    source: str = ""  #: canonical: `load_model(source)` builds it again, from any working directory
    name: str = ""
    task: Task = "other"
    example: Any = None  #: a batch to run it on, or None where nobody knows one
    tokenizer: Any = None  #: the tokenizer or processor that belongs to it
    image: ImageInput | None = None  #: preprocessing, where its source states it
