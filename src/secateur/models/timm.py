"""``timm:NAME?pretrained=true``: PyTorch Image Models."""

from __future__ import annotations

import math
from typing import Any

import torch

from secateur.errors import MissingExtra, ModelError, did_you_mean
from secateur.models.loaded import ImageInput, Loaded
from secateur.models.registry import MODELS
from secateur.models.safety import no_pickle
from secateur.models.torchvision_shim import prepare_torchvision
from secateur.sources import Source, blaming


@MODELS.register("timm", source="timm.create_model")
def from_timm(source: Source, *, pretrained: bool = False, **options: Any) -> Loaded:
    """``timm:NAME?pretrained=true&num_classes=10``: a timm model; other options go to ``timm.create_model``."""
    prepare_torchvision()
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "timm", "vision", "a timm: model") from error
    base, _, tag = source.rest.partition(".")
    if not timm.is_model(base):
        raise ModelError(
            f"timm has no model {source.rest!r}{did_you_mean(base, timm.list_models())} `timm.list_models()` lists all."
        )
    tags = [name.partition(".")[2] for name in timm.list_pretrained(base + "*") if name.partition(".")[0] == base]
    if tag and tag not in tags:
        raise ModelError(f"timm's {base} has no weights {tag!r}{did_you_mean(tag, tags)} Known: {', '.join(tags) or 'none'}.")
    checkpoint = options.get("checkpoint_path")
    if checkpoint is not None and not str(checkpoint).endswith(".safetensors"):
        raise ModelError(f"checkpoint_path {checkpoint!r} is refused: a pickle can run code. Convert it to .safetensors first.")
    with no_pickle(), blaming(f"timm's {source.rest}", ModelError):
        model = timm.create_model(source.rest, pretrained=bool(pretrained), **options)
        config = timm.data.resolve_model_data_config(model)
    image = _image(config, options.get("in_chans", config["input_size"][0]))
    example = torch.zeros(1, image.channels, *image.size)
    return Loaded(model, source=str(source), name=source.rest, task="image", example=example, image=image)


def _image(config: dict[str, Any], channels: int) -> ImageInput:
    _, height, width = config["input_size"]
    resize = math.floor(min(height, width) / config.get("crop_pct", 1.0))
    mean, std = _by_channel(config["mean"], channels), _by_channel(config["std"], channels)
    return ImageInput((height, width), channels, mean, std, resize, config.get("interpolation", "bilinear"))


def _by_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """The values as they are where they fit the channels, else their mean: timm keeps three for `in_chans` other than 3."""
    return tuple(values) if len(values) in (1, channels) else (sum(values) / len(values),)
